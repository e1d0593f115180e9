// wkv7 for heads of 64 channels in bfloat16, in chunks of 64 tokens on tensor cores.
//
// The algebra is that of rwkv/ops/wkv7_triton_kernels.py: within a chunk, with l_t = -exp(w_t) and
// L_t = l_1 + ... + l_t,
//
//     u = X (A_ak V + a^ S^T)      y = A_rk V + A_rb u + r^ S^T      S' = S diag(e^L_C) + V^T k_ + u^T b_
//
// which is affine in S:  S' = S (diag(e^L_C) + M) + c,  y = y0 + R S^T. wkv7_prepare makes M, c, R, y0
// and X of all chunks at once, wkv7_scan walks the states through them, wkv7_reverse the gradient of
// the state back, and wkv7_gradient makes the other gradients of all chunks at once. e^L is taken
// relative to the chunk's middle: with w <= -0.5 no factor passes 2^28, so what carries such factors
// (`_in`) is bfloat16; all other operands are scaled to about 1 by powers of two and float16.
//
// A warp owns 16 of the 64 rows of every tile: tokens, or of M and c columns of the state. X is lower
// triangular with ones on the diagonal; its ten blocks of 16 x 16 on and below it are kept.
#include "chunks.cuh"

constexpr int BLOCK = 512;           // bytes of a block of X
constexpr int BLOCKS = 10 * BLOCK;   // of X
constexpr int SCALARS = 68;          // of a chunk: log2 of what it keeps of 64 columns; exponents of r, k, v
constexpr int STAGES = 3;            // chunks of a scan under way

// ---- blocks of X: 16 rows of 32 bytes, the halves of rows 4 to 7 and 12 to 15 swapped ----

__device__ __forceinline__ unsigned char* block_of(unsigned char* blocks, int i, int j) {
    return blocks + (i * (i + 1) / 2 + j) * BLOCK;
}

template <class Me>
__device__ __forceinline__ void left_block(uint32_t a[4], unsigned char* block, const Me& me) {
    ldmatrix_x4(a, block + place_in_narrow(me.lane & 15, me.lane >> 4));
}

template <class Me>
__device__ __forceinline__ void left_block_transposed(uint32_t a[4], unsigned char* block,
                                                      const Me& me) {
    const int i = me.lane >> 3;
    ldmatrix_x4_trans(a, block + place_in_narrow((i >> 1) * 8 + (me.lane & 7), i & 1));
}

__device__ __forceinline__ void write_block(unsigned char* block, const float c[2][4],
                                            const Lane& me) {
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int below = 0; below < 2; ++below)
            *reinterpret_cast<uint32_t*>(block + place_in_narrow(me.g + 8 * below, half) + me.q * 4) =
                pack_f16(c[half][2 * below], c[half][2 * below + 1]);
    __syncwarp();
}

// c += X tile, or X^T tile, for the warp's rows
template <bool TRANSPOSED, class Me>
__device__ __forceinline__ void add_inverse(NumbersOf<Me>& c, unsigned char* blocks,
                                            unsigned char* tile, const Me& me) {
#pragma unroll 1
    for (int i = TRANSPOSED ? me.strip : 0; i <= (TRANSPOSED ? 3 : me.strip); ++i) {
        uint32_t a[4];
        if (TRANSPOSED)
            left_block_transposed(a, block_of(blocks, i, me.strip), me);
        else
            left_block(a, block_of(blocks, me.strip, i), me);
        add_step<F16>(c, a, tile, 16 * i, me);
    }
}

// ---- decays ----

// l in units of log2, of the warp's rows; 0 behind the sequence's end.
template <class Me>
__device__ __forceinline__ void log2_steps(NumbersOf<Me>& x, int row, int left, const Me& me) {
#pragma unroll
    for (int j = 0; j < Me::J; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            x[j][e] = row + me.g + (e >> 1) * 8 < left
                          ? -exp2_approx(fmaf(x[j][e], LOG2_E, LOG2_LOG2_E))
                          : 0.0f;
}

__device__ __forceinline__ void scale_pair(float2& x, float by) { x.x *= by, x.y *= by; }

// (1 - A)^-1 of a strictly lower triangular 16 x 16 matrix in float32; column lane % 16. The block
// may lie where A does.
__device__ __forceinline__ void invert(unsigned char* block, const float* A, const Lane& me) {
    const int column = me.lane & 15;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
        for (int m = 0; m < i; ++m) sum = fmaf(A[i * 16 + m], x[m], sum);
        x[i] = sum;
    }
    __syncwarp();
    if (me.lane < 16)
#pragma unroll
        for (int i = 0; i < 16; ++i)
            *reinterpret_cast<uint16_t*>(block + place_in_narrow(i, column >> 3) + (column & 7) * 2) =
                float_to_f16(x[i]);
}

extern "C" __global__ void __launch_bounds__(256, LARGE_BLOCKS)
    wkv7_prepare(const uint16_t* r, const uint16_t* w, const uint16_t* k, const uint16_t* v,
                 const uint16_t* a, const uint16_t* b, uint16_t* y, uint16_t* transition,
                 uint16_t* drive, uint16_t* readout, unsigned char* inverse, float* scalars,
                 const int* owners, const int64_t* cu_seqlens, int T, int H) {
    DYNAMIC_TILES(memory);
    unsigned char *const k_in = memory, *const b_in = memory + TILE, *const r_in = memory + 2 * TILE,
                         *const a_in = memory + 3 * TILE, *const values = memory + 4 * TILE,
                         *const a_start = memory + 5 * TILE, *const r_start = memory + 6 * TILE,
                         *const b_end = memory + 7 * TILE, *const k_end = memory + 8 * TILE,
                         *const A_ab = memory + 9 * TILE, *const u = memory + 10 * TILE,
                         *const blocks = memory + 11 * TILE;
    unsigned char *const w_raw = A_ab, *const Xa = a_start;
    float* const sums = reinterpret_cast<float*>(blocks + BLOCKS);
    float* const maxima = sums + 4 * SIDE;  // [3][8]
    // Two groups of four warps: the first makes X, X a^, M and c, the second u, R and y0. Of what
    // they do for all (`own`) each has 32 columns.
    const Lane me;
    const LaneOf<2> own;
    const bool second = __shfl_sync(ALL, me.warp, 0) >= 4;  // the compiler sees it is the warp's
    const int slot = blockIdx.x / H, h = blockIdx.x % H, row = 16 * me.strip;
    const Chunk chunk = find_chunk(slot, owners, cu_seqlens, T);
    if (chunk.left <= 0) return;
    const int64_t unit = blockIdx.x, first = (chunk.first * H + h) * SIDE;
    const int64_t stride = static_cast<int64_t>(H) * SIDE * 2;
    fetch_rows(w_raw, w + first, stride, row, chunk.left, own);
    fetch_rows(r_in, r + first, stride, row, chunk.left, own);
    fetch_rows(k_in, k + first, stride, row, chunk.left, own);
    fetch_rows(values, v + first, stride, row, chunk.left, own);
    fetch_rows(a_in, a + first, stride, row, chunk.left, own);
    fetch_rows(b_in, b + first, stride, row, chunk.left, own);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();

    NumbersOf<LaneOf<2>> step, L;
    float most[3];
    unsigned char* const sized[3] = {r_in, k_in, values};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        read_rows<BF16>(L, sized[i], row, own);
        most[i] = largest_of_warp(largest(L));
    }
    read_rows<BF16>(step, w_raw, row, own);
    log2_steps(step, row, chunk.left, own);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) L[j][e] = step[j][e];
    accumulate(L, own);
    if (me.g == 7)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            *reinterpret_cast<float2*>(sums + me.strip * SIDE + 8 * (own.piece + j) + 2 * me.q) =
                make_float2(L[j][2], L[j][3]);
    if (me.lane < 3)
        maxima[me.lane * 8 + me.warp] = me.lane == 0 ? most[0] : me.lane == 1 ? most[1] : most[2];
    __syncthreads();

    float exponent[3];
#pragma unroll
    for (int i = 0; i < 3; ++i)
        exponent[i] = exponent_below(largest_of_warp(maxima[8 * i + (me.lane & 7)]));
    const float k_scale = power_of(-exponent[1]), v_scale = power_of(-exponent[2]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const Halves l(sums, j, own);
        const float in[2] = {exp2_approx(l.middle[0]), exp2_approx(l.middle[1])};
        const float out[2] = {exp2_approx(l.rest[0]), exp2_approx(l.rest[1])};
        if (me.strip == 0 && me.g == 0)
            *reinterpret_cast<float2*>(scalars + unit * SCALARS + 8 * (own.piece + j) + 2 * me.q) =
                make_float2(l.middle[0] + l.rest[0], l.middle[1] + l.rest[1]);
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int t = row + 8 * below;
            const float L0 = L[j][2 * below] + (l.before[0] - l.middle[0]);
            const float L1 = L[j][2 * below + 1] + (l.before[1] - l.middle[1]);
            float2 pair = unpack_bf16(*pair_at(a_in, t, j, own));
            pair.x *= exp2_approx(L0 - step[j][2 * below]);
            pair.y *= exp2_approx(L1 - step[j][2 * below + 1]);
            *pair_at(a_in, t, j, own) = pack_bf16(pair.x, pair.y);
            *pair_at(a_start, t, j, own) = pack_f16(pair.x * in[0], pair.y * in[1]);

            pair = unpack_bf16(*pair_at(r_in, t, j, own));
            pair.x *= exp2_approx(L0 - exponent[0]);
            pair.y *= exp2_approx(L1 - exponent[0]);
            *pair_at(r_in, t, j, own) = pack_bf16(pair.x, pair.y);
            *pair_at(r_start, t, j, own) = pack_f16(pair.x * in[0], pair.y * in[1]);

            const float grow0 = exp2_approx(-L0), grow1 = exp2_approx(-L1);
            pair = unpack_bf16(*pair_at(b_in, t, j, own));
            pair.x *= grow0, pair.y *= grow1;
            *pair_at(b_in, t, j, own) = pack_bf16(pair.x, pair.y);
            *pair_at(b_end, t, j, own) = pack_f16(pair.x * out[0], pair.y * out[1]);

            pair = unpack_bf16(*pair_at(k_in, t, j, own));
            pair.x *= grow0 * k_scale, pair.y *= grow1 * k_scale;
            *pair_at(k_in, t, j, own) = pack_bf16(pair.x, pair.y);
            *pair_at(k_end, t, j, own) = pack_f16(pair.x * out[0], pair.y * out[1]);

            pair = unpack_bf16(*pair_at(values, t, j, own));
            scale_pair(pair, v_scale);
            *pair_at(values, t, j, own) = pack_f16(pair.x, pair.y);
        }
    }
    group_fence();
    __syncthreads();

    Numbers x;
    Operand A_rk, A_rb;
    if (second) {
        multiply_to_triangle<BF16, F16>(A_rk, a_in, k_in, false, false, 1.0f, me);  // A_ak
        clear(x);
        add_product<F16>(x, A_rk, values, me);
        write_rows<F16>(u, x, row, me);
        multiply_to_triangle<BF16, F16>(A_rk, r_in, k_in, false, true, 1.0f, me);
        multiply_to_triangle<BF16, F16>(A_rb, r_in, b_in, false, true, 1.0f, me);
        if (me.warp == 4 && me.lane < 4)
            scalars[unit * SCALARS + SIDE + me.lane] = me.lane == 0   ? exponent[0]
                                                       : me.lane == 1 ? exponent[1]
                                                       : me.lane == 2 ? exponent[2]
                                                                      : 0.0f;
    } else {
        // A_ab: in float16 for products, its blocks on the diagonal in float32 for their inverses
        multiply_by_rows<BF16>(x, a_in, b_in, me);
        write_rows<F16>(A_ab, x, row, me);
        // The latter lie among X's blocks, each around the one that its inverse becomes
        float* const A = reinterpret_cast<float*>(blocks + me.strip * (me.strip + 3) / 4 * 1024);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i == me.strip)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int below = 0; below < 2; ++below)
                        *reinterpret_cast<float2*>(A + (me.g + 8 * below) * 16 + 8 * half + 2 * me.q) =
                            make_float2(x[2 * i + half][2 * below], x[2 * i + half][2 * below + 1]);
        __syncwarp();
        invert(block_of(blocks, me.strip, me.strip), A, me);
        named_barrier_sync(1, 128);

        // Column `strip` of X's blocks: X_ij = X_ii (sum over m from j to i - 1 of A_im X_mj)
        for (int i = me.strip + 1; i < 4; ++i) {
            float c[2][4] = {};
            uint32_t left[4], right[4];
            for (int m = me.strip; m < i; ++m) {
                left_rows(left, A_ab, 16 * i, m, me);
                right_block(right, block_of(blocks, m, me.strip), me);
                mma_f16(c[0], left, right);
                mma_f16(c[1], left, right + 2);
            }
            unsigned char* const mine = block_of(blocks, i, me.strip);
            write_block(mine, c, me);
            left_block(left, block_of(blocks, i, i), me);
            right_block(right, mine, me);
#pragma unroll
            for (int e = 0; e < 4; ++e) c[0][e] = c[1][e] = 0.0f;
            mma_f16(c[0], left, right);
            mma_f16(c[1], left, right + 2);
            write_block(mine, c, me);
        }
    }
    __syncthreads();

    unsigned char* const place = second ? u : Xa;
    clear(x);
    add_inverse<false>(x, blocks, place, me);
    named_barrier_sync(1 + second, 128);
    write_rows<F16>(place, x, row, me);
    group_fence();
    __syncthreads();

    unsigned char* const stage = k_in + 1024 * me.warp;
    if (second) {
        read_rows<F16>(x, r_start, row, me);
        add_product<F16>(x, A_rb, Xa, me);
        store_by_halves<F16>(readout + unit * SIDE * SIDE, 2 * SIDE, stage, x, row, SIDE, me);
        clear(x);
        add_product<F16>(x, A_rk, values, me);
        add_product<F16>(x, A_rb, u, me);
        const float y_scale = power_of(exponent[0] + exponent[1] + exponent[2]);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[j][e] *= y_scale;
        store_by_halves<BF16>(y + first, stride, stage, x, row, chunk.left, me);
    } else {
        if (inverse != nullptr)
            for (int i = threadIdx.x; i < BLOCKS / 16; i += 128)
                reinterpret_cast<uint4*>(inverse + unit * BLOCKS)[i] =
                    reinterpret_cast<uint4*>(blocks)[i];
        multiply_columns<F16, false>(x, Xa, b_end, me);
        store_by_halves<F16>(transition + unit * SIDE * SIDE, 2 * SIDE, stage, x, row, SIDE, me);
        multiply_columns<F16, false>(x, values, k_end, me);
        multiply_columns<F16, true>(x, u, b_end, me);
        store_by_halves<F16>(drive + unit * SIDE * SIDE, 2 * SIDE, stage, x, row, SIDE, me);
    }
}

// ---- scans: each warp of a block owns 16 value rows of one head's state ----

// One chunk of a scan in shared memory.
struct Stage {
    unsigned char *transition, *readout, *narrow, *rows;  // the last two of this warp
    float* scalars;
    __device__ __forceinline__ Stage(unsigned char* memory, int stage, int warps, int per_warp,
                                     const Lane& me) {
        memory += stage * (2 * TILE + 512 + warps * per_warp);
        transition = memory;
        readout = memory + TILE;
        scalars = reinterpret_cast<float*>(memory + 2 * TILE);
        narrow = memory + 2 * TILE + 512 + me.strip * per_warp;  // 64 rows of 32 bytes
        rows = narrow + 2048;                                   // 16 rows of 128 bytes
    }
};

__device__ __forceinline__ void fetch_tile(unsigned char* tile, const uint16_t* from) {
    for (int i = threadIdx.x; i < TILE / 16; i += blockDim.x)
        cp_async_16(tile + place(i >> 3, i & 7), from + i * 8, true);
}

// Tokens' 16 channels of the warp, as 64 rows of 32 bytes.
__device__ __forceinline__ void fetch_narrow(unsigned char* narrow, const uint16_t* from,
                                             int64_t stride, int rows, const Lane& me) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int r = (me.lane >> 1) + 16 * i, half = me.lane & 1;
        cp_async_16(narrow + place_in_narrow(r, half), r < rows ? from + r * stride + half * 8 : from,
                    r < rows);
    }
}

__device__ __forceinline__ void fetch_scalars(float* to, const float* from) {
    if (threadIdx.x < SCALARS / 4) cp_async_16(to + 4 * threadIdx.x, from + 4 * threadIdx.x, true);
}

__device__ __forceinline__ void read_state(Numbers& S, const float* from, const Lane& me) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const float2 pair =
                *reinterpret_cast<const float2*>(from + (me.g + 8 * below) * SIDE + 8 * j + 2 * me.q);
            S[j][2 * below] = pair.x, S[j][2 * below + 1] = pair.y;
        }
}

__device__ __forceinline__ void write_state(float* to, const Numbers& S, const Lane& me) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below)
            *reinterpret_cast<float2*>(to + (me.g + 8 * below) * SIDE + 8 * j + 2 * me.q) =
                make_float2(S[j][2 * below], S[j][2 * below + 1]);
}

// S as a left operand, each row divided by the power of two at or below its largest number; the
// exponents of rows g and g + 8.
__device__ __forceinline__ void pack_state(Operand& a, float exponent[2], const Numbers& S) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        float most = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            most = fmaxf(most, fmaxf(fabsf(S[j][2 * below]), fabsf(S[j][2 * below + 1])));
        exponent[below] = exponent_below(largest_of_row(most));
        const float scale = power_of(-exponent[below]);
#pragma unroll
        for (int j = 0; j < 8; ++j)
            a[j >> 1][(j & 1) * 2 + below] =
                pack_f16(S[j][2 * below] * scale, S[j][2 * below + 1] * scale);
    }
}

// The packed state and its exponents to global memory; `states` and `exponents` of the warp's rows.
__device__ __forceinline__ void keep_state(uint16_t* states, float* exponents, const Operand& a,
                                           const float exponent[2], const Lane& me) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below)
            *reinterpret_cast<uint32_t*>(states + (me.g + 8 * below) * SIDE + 8 * j + 2 * me.q) =
                a[j >> 1][(j & 1) * 2 + below];
    if (me.q < 2) exponents[me.g + 8 * me.q] = me.q == 0 ? exponent[0] : exponent[1];
}

extern "C" __global__ void __launch_bounds__(128, 2)
    wkv7_scan(const float* initial, const uint16_t* transition, const uint16_t* drive,
              const uint16_t* readout, const float* scalars, uint16_t* y, uint16_t* states,
              float* exponents, float* final, const int64_t* cu_seqlens, int T, int H) {
    DYNAMIC_TILES(memory);
    const Lane me;
    const int warps = blockDim.x >> 5, parts = 4 / warps;
    const int64_t unit = blockIdx.x / parts;
    const int q = unit / H, h = unit % H, row = 16 * (blockIdx.x % parts * warps + me.strip);
    const Sequence sequence = find_sequence(q, cu_seqlens, T);
    const int chunks = (sequence.length + SIDE - 1) / SIDE;
    const int64_t stride = static_cast<int64_t>(H) * SIDE;

    const auto fetch = [&](int i) {
        if (i < chunks) {
            const Stage stage(memory, i % STAGES, warps, 4096, me);
            const int64_t one = (sequence.slot + i) * H + h;
            fetch_tile(stage.transition, transition + one * SIDE * SIDE);
            fetch_tile(stage.readout, readout + one * SIDE * SIDE);
            fetch_scalars(stage.scalars, scalars + one * SCALARS);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int r = 4 * n + (me.lane >> 3), piece = me.lane & 7;
                cp_async_16(stage.rows + place(r, piece),
                            drive + one * SIDE * SIDE + (row + r) * SIDE + piece * 8, true);
            }
            fetch_narrow(stage.narrow,
                         y + ((sequence.begin + i * SIDE) * H + h) * SIDE + row, stride,
                         sequence.length - i * SIDE, me);
        }
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) fetch(i);

    Numbers S;
    read_state(S, initial + unit * SIDE * SIDE + row * SIDE, me);
    for (int i = 0; i < chunks; ++i) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(i + STAGES - 1);
        const Stage stage(memory, i % STAGES, warps, 4096, me);
        const int64_t one = (sequence.slot + i) * H + h;
        const float r_exponent = stage.scalars[SIDE];
        const float c_scale = power_of(stage.scalars[SIDE + 1] + stage.scalars[SIDE + 2]);

        Operand before;
        float exponent[2];
        pack_state(before, exponent, S);
        Numbers moved;
        clear(moved);
        add_by_columns<F16>(moved, before, stage.transition, me);
        const float scale[2] = {power_of(exponent[0]), power_of(exponent[1])};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 log2_kept =
                *reinterpret_cast<const float2*>(stage.scalars + 8 * j + 2 * me.q);
            const float kept[2] = {exp2_approx(log2_kept.x), exp2_approx(log2_kept.y)};
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const float2 c = unpack_f16(*pair_at(stage.rows, 8 * below, j, me));
                S[j][2 * below] = fmaf(S[j][2 * below], kept[0],
                                       fmaf(c.x, c_scale, moved[j][2 * below] * scale[below]));
                S[j][2 * below + 1] = fmaf(S[j][2 * below + 1], kept[1],
                                           fmaf(c.y, c_scale, moved[j][2 * below + 1] * scale[below]));
            }
        }
        if (states != nullptr)
            keep_state(states + one * SIDE * SIDE + row * SIDE, exponents + one * SIDE + row, before,
                       exponent, me);

        float y_scale[2][2];  // of columns 8 half + 2 q + e of the outputs: rows of the state
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                y_scale[half][e] =
                    power_of(__shfl_sync(ALL, exponent[half], 4 * (2 * me.q + e)) + r_exponent);
        uint16_t* const out = y + ((sequence.begin + i * SIDE) * H + h) * SIDE + row;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            float read[2][4] = {};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                uint32_t left[4];
                left_rows(left, stage.readout, 16 * m, k, me);
                const uint32_t upper[2] = {before[k][0], before[k][2]};
                const uint32_t lower[2] = {before[k][1], before[k][3]};
                mma_f16(read[0], left, upper);
                mma_f16(read[1], left, lower);
            }
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int t = 16 * m + me.g + 8 * below;
                if (t < sequence.length - i * SIDE)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 y0 = unpack_bf16(*reinterpret_cast<const uint32_t*>(
                            stage.narrow + place_in_narrow(t, half) + me.q * 4));
                        *reinterpret_cast<uint32_t*>(out + t * stride + 8 * half + 2 * me.q) =
                            pack_bf16(fmaf(read[half][2 * below], y_scale[half][0], y0.x),
                                      fmaf(read[half][2 * below + 1], y_scale[half][1], y0.y));
                    }
            }
        }
    }
    write_state(final + unit * SIDE * SIDE + row * SIDE, S, me);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    wkv7_reverse(const float* grad_final, const uint16_t* transition, const uint16_t* readout,
                 const float* scalars, const uint16_t* grad_y, uint16_t* grad_states,
                 float* grad_exponents, float* grad_initial, const int64_t* cu_seqlens, int T, int H) {
    DYNAMIC_TILES(memory);
    const Lane me;
    const int warps = blockDim.x >> 5, parts = 4 / warps;
    const int64_t unit = blockIdx.x / parts;
    const int q = unit / H, h = unit % H, row = 16 * (blockIdx.x % parts * warps + me.strip);
    const Sequence sequence = find_sequence(q, cu_seqlens, T);
    const int chunks = (sequence.length + SIDE - 1) / SIDE;
    const int64_t stride = static_cast<int64_t>(H) * SIDE;

    const auto fetch = [&](int back) {
        if (back < chunks) {
            const int i = chunks - 1 - back;
            const Stage stage(memory, back % STAGES, warps, 2048, me);
            const int64_t one = (sequence.slot + i) * H + h;
            fetch_tile(stage.transition, transition + one * SIDE * SIDE);
            fetch_tile(stage.readout, readout + one * SIDE * SIDE);
            fetch_scalars(stage.scalars, scalars + one * SCALARS);
            fetch_narrow(stage.narrow,
                         grad_y + ((sequence.begin + i * SIDE) * H + h) * SIDE + row, stride,
                         sequence.length - i * SIDE, me);
        }
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) fetch(i);

    Numbers dS;
    read_state(dS, grad_final + unit * SIDE * SIDE + row * SIDE, me);
    for (int back = 0; back < chunks; ++back) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(back + STAGES - 1);
        const Stage stage(memory, back % STAGES, warps, 2048, me);
        const int64_t one = (sequence.slot + chunks - 1 - back) * H + h;

        // dy to float16, in its place
        uint4 pieces[4];
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pieces[i] = *reinterpret_cast<const uint4*>(
                stage.narrow + place_in_narrow((me.lane >> 1) + 16 * i, me.lane & 1));
            const uint32_t words[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float2 pair = unpack_bf16(words[n]);
                most = fmaxf(most, fmaxf(fabsf(pair.x), fabsf(pair.y)));
            }
        }
        const float y_exponent = exponent_below(largest_of_warp(most));
        const float y_scale = power_of(-y_exponent);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t words[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float2 pair = unpack_bf16(words[n]);
                words[n] = pack_f16(pair.x * y_scale, pair.y * y_scale);
            }
            *reinterpret_cast<uint4*>(
                stage.narrow + place_in_narrow((me.lane >> 1) + 16 * i, me.lane & 1)) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
        __syncwarp();
        Numbers read, moved;
        clear(read);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t left[4];
            left_block_transposed(left, stage.narrow + 512 * k, me);
            add_step<F16>(read, left, stage.readout, 16 * k, me);
        }

        Operand after;
        float exponent[2];
        pack_state(after, exponent, dS);
        clear(moved);
        add_by_rows<F16>(moved, after, stage.transition, me);
        keep_state(grad_states + one * SIDE * SIDE + row * SIDE, grad_exponents + one * SIDE + row,
                   after, exponent, me);
        const float scale[2] = {power_of(exponent[0]), power_of(exponent[1])};
        const float read_scale = power_of(y_exponent + stage.scalars[SIDE]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 log2_kept =
                *reinterpret_cast<const float2*>(stage.scalars + 8 * j + 2 * me.q);
            const float kept[2] = {exp2_approx(log2_kept.x), exp2_approx(log2_kept.y)};
#pragma unroll
            for (int e = 0; e < 4; ++e)
                dS[j][e] = fmaf(dS[j][e], kept[e & 1],
                                fmaf(moved[j][e], scale[e >> 1], read[j][e] * read_scale));
        }
    }
    write_state(grad_initial + unit * SIDE * SIDE + row * SIDE, dS, me);
}

// l in units of log2 of token row + g, own columns 8 j + 2 q, from global memory; 0 behind the end.
__device__ __forceinline__ float2 log2_step(const uint16_t* w, int64_t stride, int row, int j,
                                            int left, const LaneOf<2>& me) {
    const int t = row + me.g;
    if (t >= left) return make_float2(0.0f, 0.0f);
    const float2 x = unpack_bf16(
        *reinterpret_cast<const uint32_t*>(w + t * stride + 8 * (me.piece + j) + 2 * me.q));
    return make_float2(-exp2_approx(fmaf(x.x, LOG2_E, LOG2_LOG2_E)),
                       -exp2_approx(fmaf(x.y, LOG2_E, LOG2_LOG2_E)));
}

// L of a column pair relative to the chunk's middle, of which only the size is kept: it is not
// negative in rows before the middle and not positive behind. In 16 bits, in units of 2^-9: what is
// multiplied by 2^L is off by 7e-4 at most, where rounding to bfloat16 is 4e-3 at most.
constexpr float LOG_UNIT = 1.0f / 512;
constexpr float WHOLE = 8388608.0f;  // 2^23: a sum with it keeps whole numbers, in its last bits

__device__ __forceinline__ uint32_t pack_log(float x, float y) {
    const uint32_t low = __float_as_uint(fmaf(fabsf(x), 1.0f / LOG_UNIT, WHOLE));
    const uint32_t high = __float_as_uint(fmaf(fabsf(y), 1.0f / LOG_UNIT, WHOLE));
    return __byte_perm(low, high, 0x5410);
}

// What was packed times `unit`, plus a number of halves.
__device__ __forceinline__ float2 unpack_log(uint32_t bits, float unit, float plus) {
    const uint32_t whole = __float_as_uint(WHOLE);
    const float offset = plus - WHOLE * unit;
    return make_float2(fmaf(__uint_as_float(__byte_perm(bits, whole, 0x7610)), unit, offset),
                       fmaf(__uint_as_float(__byte_perm(bits, whole, 0x7632)), unit, offset));
}

// The warp's part of a tile of float16, each row times 2 to (exponents[row] - unit).
__device__ __forceinline__ void rescale_rows(unsigned char* tile, const float* exponents, float unit,
                                             int row, const LaneOf<2>& me) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int r = row + 8 * i + (me.lane >> 2);
        const float scale = power_of(exponents[r] - unit);
        uint4* const at = reinterpret_cast<uint4*>(tile + place(r, me.piece + (me.lane & 3)));
        const uint4 piece = *at;
        uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const float2 pair = unpack_f16(words[n]);
            words[n] = pack_f16(pair.x * scale, pair.y * scale);
        }
        *at = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Tiles of values and of what is read and written are in units of powers of two: r, k, v and dy of
// their own, u and S of 2^eu, their gradients and dS of 2^ez, so that all sums below have one unit,
// 2^(eu + ez). The gradient of a tile with a decay in it, times that tile, is its share of the
// gradient of L; there the factor is the rounded operand of the products, so that what must cancel
// cancels. A gradient's unit comes as two factors: where r or k are 0 in all of a chunk, one alone is
// infinite.
extern "C" __global__ void __launch_bounds__(256, LARGE_BLOCKS)
    wkv7_gradient(const uint16_t* r, const uint16_t* w, const uint16_t* k, const uint16_t* v,
                  const uint16_t* a, const uint16_t* b, const uint16_t* grad_y,
                  const uint16_t* states, const float* exponents, const uint16_t* grad_states,
                  const float* grad_exponents, const unsigned char* inverse, const float* scalars,
                  uint16_t* dr, uint16_t* dw, uint16_t* dk, uint16_t* dv, uint16_t* da, uint16_t* db,
                  const int* owners, const int64_t* cu_seqlens, int T, int H) {
    DYNAMIC_TILES(memory);
    unsigned char *const k_in = memory, *const b_in = memory + TILE, *const r_in = memory + 2 * TILE,
                         *const a_in = memory + 3 * TILE, *const values = memory + 4 * TILE,
                         *const dy = memory + 5 * TILE, *const S = memory + 6 * TILE,
                         *const dS = memory + 7 * TILE, *const u = memory + 8 * TILE,
                         *const dz = memory + 9 * TILE, *const k_end = memory + 10 * TILE;
    uint32_t* const logs = reinterpret_cast<uint32_t*>(memory + 11 * TILE);  // L, by log_at
    float* const totals = reinterpret_cast<float*>(memory + 12 * TILE);      // [4][64]
    float* const scales = totals + 4 * SIDE;   // of columns: to the chunk's start, to its end
    float* const middles = scales + 2 * SIDE;  // of columns: L of the chunk's middle from its start
    // Read before others' tiles and numbers go there
    unsigned char *const w_raw = u, *const a_start = u, *const b_end = dz,
                         *const blocks = memory + 11 * TILE;
    float* const sums = totals;  // [4][64]
    // What takes the place of k_end: rows on their way to global memory, 512 bytes a warp; what the
    // chunk's end adds for each warp and column, [8][64]; L before the first token, where log_at steps
    float* const ends = reinterpret_cast<float*>(k_end + 8 * 512);
    uint32_t* const start = reinterpret_cast<uint32_t*>(ends + 8 * SIDE);
    float* const maxima = middles + SIDE;
    // Two groups of four warps: the first makes u, da and dk, the second dz, dv, dr and db. Of
    // what they do for all (`own`) each has 32 columns.
    const Lane me;
    const LaneOf<2> own;
    const bool second = __shfl_sync(ALL, me.warp, 0) >= 4;  // the compiler sees it is the warp's
    const int slot = blockIdx.x / H, h = blockIdx.x % H, row = 16 * me.strip;
    const Chunk chunk = find_chunk(slot, owners, cu_seqlens, T);
    if (chunk.left <= 0) return;
    const int64_t unit = blockIdx.x, first = (chunk.first * H + h) * SIDE;
    const int64_t stride = static_cast<int64_t>(H) * SIDE * 2;
    fetch_rows(w_raw, w + first, stride, row, chunk.left, own);
    fetch_rows(dy, grad_y + first, stride, row, chunk.left, own);
    fetch_rows(r_in, r + first, stride, row, chunk.left, own);
    fetch_rows(k_in, k + first, stride, row, chunk.left, own);
    fetch_rows(values, v + first, stride, row, chunk.left, own);
    fetch_rows(a_in, a + first, stride, row, chunk.left, own);
    fetch_rows(b_in, b + first, stride, row, chunk.left, own);
    fetch_rows(S, states + unit * SIDE * SIDE, 2 * SIDE, row, SIDE, own);
    fetch_rows(dS, grad_states + unit * SIDE * SIDE, 2 * SIDE, row, SIDE, own);
    for (int i = threadIdx.x; i < BLOCKS / 16; i += 256)
        cp_async_16(blocks + 16 * i, inverse + unit * BLOCKS + 16 * i, true);
    cp_async_commit();
    const float er = scalars[unit * SCALARS + SIDE], ek = scalars[unit * SCALARS + SIDE + 1],
                ev = scalars[unit * SCALARS + SIDE + 2];
    const float* const S_exponents = exponents + unit * SIDE;
    const float* const dS_exponents = grad_exponents + unit * SIDE;
    const float S_most = largest_of_warp(fmaxf(S_exponents[me.lane], S_exponents[me.lane + 32]));
    const float dS_most = largest_of_warp(fmaxf(dS_exponents[me.lane], dS_exponents[me.lane + 32]));
    cp_async_wait<0>();
    __syncwarp();

    NumbersOf<LaneOf<2>> step, L;
    uint32_t packed[4][2];  // L, as X lies in its place until u and dz are made
    read_rows<BF16>(step, dy, row, own);
    const float y_most = largest_of_warp(largest(step));
    read_rows<BF16>(step, w_raw, row, own);
    log2_steps(step, row, chunk.left, own);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) L[j][e] = step[j][e];
    accumulate(L, own);
    if (me.g == 7)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            *reinterpret_cast<float2*>(sums + me.strip * SIDE + 8 * (own.piece + j) + 2 * me.q) =
                make_float2(L[j][2], L[j][3]);
    if (me.lane == 0) maxima[threadIdx.x >> 5] = y_most;
    __syncthreads();

    const float ey = exponent_below(largest_of_warp(maxima[me.lane & 7]));
    const float eu = 3.0f + fmaxf(ek + ev, S_most), ez = 3.0f + fmaxf(er + ey, dS_most);
    const float u_share = power_of(ek + ev - eu), z_share = power_of(er + ey - ez);
    // Read again where needed: registers are short
    float* const facts = maxima + 8;
    Chunk* const place = reinterpret_cast<Chunk*>(facts + 8);
    if (threadIdx.x == 0) {
        facts[0] = u_share, facts[1] = z_share, facts[2] = er, facts[3] = ek, facts[4] = ez;
        facts[5] = eu + ez;
        *place = {first, chunk.left};
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const Halves l(sums, j, own);
        const float in[2] = {exp2_approx(l.middle[0]), exp2_approx(l.middle[1])};
        const float out[2] = {exp2_approx(l.rest[0]), exp2_approx(l.rest[1])};
        if (me.strip == 0 && me.g == 0) {
            float* const at = scales + 8 * (own.piece + j) + 2 * me.q;
            *reinterpret_cast<float2*>(at) = make_float2(in[0], in[1]);
            *reinterpret_cast<float2*>(at + SIDE) = make_float2(out[0], out[1]);
            *reinterpret_cast<float2*>(at + 2 * SIDE) = make_float2(l.middle[0], l.middle[1]);
        }
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int t = row + 8 * below;
            const float L0 = L[j][2 * below] + (l.before[0] - l.middle[0]);
            const float L1 = L[j][2 * below + 1] + (l.before[1] - l.middle[1]);
            float2 pair = unpack_bf16(*pair_at(a_in, t, j, own));
            pair.x *= exp2_approx(L0 - step[j][2 * below]);
            pair.y *= exp2_approx(L1 - step[j][2 * below + 1]);
            *pair_at(a_in, t, j, own) = pack_bf16(pair.x, pair.y);
            *pair_at(a_start, t, j, own) = pack_f16(pair.x * in[0], pair.y * in[1]);

            packed[j][below] = pack_log(L0, L1);

            pair = unpack_bf16(*pair_at(r_in, t, j, own));
            *pair_at(r_in, t, j, own) =
                pack_bf16(pair.x * exp2_approx(L0 - er), pair.y * exp2_approx(L1 - er));

            const float grow0 = exp2_approx(-L0), grow1 = exp2_approx(-L1);
            pair = unpack_bf16(*pair_at(b_in, t, j, own));
            pair.x *= grow0, pair.y *= grow1;
            *pair_at(b_in, t, j, own) = pack_bf16(pair.x, pair.y);
            *pair_at(b_end, t, j, own) = pack_f16(pair.x * out[0], pair.y * out[1]);

            pair = unpack_bf16(*pair_at(k_in, t, j, own));
            const float k_scale = power_of(-ek);
            pair.x *= grow0 * k_scale, pair.y *= grow1 * k_scale;
            *pair_at(k_in, t, j, own) = pack_bf16(pair.x, pair.y);
            *pair_at(k_end, t, j, own) = pack_f16(pair.x * out[0], pair.y * out[1]);

            pair = unpack_bf16(*pair_at(values, t, j, own));
            scale_pair(pair, power_of(-ev));
            *pair_at(values, t, j, own) = pack_f16(pair.x, pair.y);
            pair = unpack_bf16(*pair_at(dy, t, j, own));
            scale_pair(pair, power_of(-ey));
            *pair_at(dy, t, j, own) = pack_f16(pair.x, pair.y);
        }
    }
    rescale_rows(S, S_exponents, eu, row, own);
    rescale_rows(dS, dS_exponents, ez, row, own);
    group_fence();
    __syncthreads();

    // What the chunk reads, z = A_ak v + a^ S^T, and the gradient of what it writes
    Numbers x;
    Operand part;
    unsigned char* const first_tile = second ? b_end : a_start;
    multiply_by_rows<F16>(x, first_tile, second ? dS : S, me);
    multiply_to_triangle<BF16, F16>(part, second ? b_in : a_in, second ? r_in : k_in, second, second,
                                    second ? z_share : u_share, me);  // A_rb^T, A_ak
    add_product<F16>(x, part, second ? dy : values, me);
    named_barrier_sync(1 + second, 128);
    write_rows<F16>(first_tile, x, row, me);
    named_barrier_sync(1 + second, 128);

    // u = X z, dz = X^T (that gradient), each in its place
    clear(x);
    if (second)
        add_inverse<true>(x, blocks, dz, me);
    else
        add_inverse<false>(x, blocks, u, me);
    __syncthreads();  // X was read by both groups
    write_rows<F16>(first_tile, x, row, me);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below)
            *log_at(logs, 4 * second + j, below, me) = packed[j][below];
    group_fence();
    __syncthreads();

    unsigned char* const stage = k_end + 512 * me.warp;
    const float log_unit = me.strip < 2 ? LOG_UNIT : -LOG_UNIT;
    if (second) {
        Numbers grad_v;
        multiply_by_rows<F16>(grad_v, k_end, dS, me);
        named_barrier_arrive(3, 256);
        multiply_to_triangle<BF16, F16>(part, k_in, r_in, true, true, facts[1], me);  // A_rk^T
        add_product<F16>(grad_v, part, dy, me);
        multiply_to_triangle<BF16, F16>(part, k_in, a_in, true, false, 1.0f, me);  // A_ak^T
        add_product<F16>(grad_v, part, dz, me);
        const float v_scale = exp2_approx(facts[3] + facts[4]);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) grad_v[j][e] *= v_scale;
        named_barrier_sync(2, 128);
        store_by_halves<BF16, 8>(dv + place->first, stride, stage, grad_v, row, place->left, me);
    }

    // da, dr: what the readers' gradients are, and their shares of the gradient of L
    Numbers dL;
    {
        const float share = second ? facts[1] : 1.0f;
        unsigned char *const left = second ? dy : dz, *const reader = second ? r_in : a_in;
        multiply_by_columns<F16>(x, left, S, me);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * j + 2 * me.q);
            const float in[2] = {scale.x * share, scale.y * share};
#pragma unroll
            for (int e = 0; e < 4; ++e) x[j][e] *= in[e & 1];
        }
        multiply_to_triangle<F16, BF16>(part, left, values, false, second, share * facts[0], me);
        add_product<BF16>(x, part, k_in, me);
        multiply_to_triangle<F16, BF16>(part, left, u, false, second, share, me);
        add_product<BF16>(x, part, b_in, me);
        // r is read behind its token's decay, a before it: with L of the row above
        const uint32_t* seen[2] = {log_at(logs, 0, 0, me), log_at(logs, 0, 1, me)};
        if (!second) {
            named_barrier_sync(3, 256);  // k_end was read
            if (me.g == 0) {
                seen[1] = seen[0] + 28;
                if (me.strip == 0)
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        const float2 middle =
                            *reinterpret_cast<const float2*>(middles + 8 * j + 2 * me.q);
                        start[64 * j + me.q] = pack_log(middle.x, middle.y);
                    }
                seen[0] = me.strip == 0 ? start + me.q : seen[0] - 15 * 32 + 28;
            } else {
                seen[0] -= 4, seen[1] -= 4;
            }
        }
        const float half = 0.5f * (facts[5] - (second ? facts[2] : 0.0f)), rest = exp2_approx(half);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int e = 2 * below;
                const float2 factor = unpack_bf16(*pair_at(reader, row + 8 * below, j, me));
                const float2 log = unpack_log(seen[below][64 * j], log_unit, half);
                dL[j][e] = factor.x * x[j][e];
                dL[j][e + 1] = factor.y * x[j][e + 1];
                x[j][e] = x[j][e] * exp2_approx(log.x) * rest;
                x[j][e + 1] = x[j][e + 1] * exp2_approx(log.y) * rest;
            }
        store_by_halves<BF16, 8>((second ? dr : da) + place->first, stride, stage, x, row, place->left, me);
    }
    if (!second) {
        // L_before of a token is L of the one before: its share moves there. That of the warp's
        // first row goes to an earlier warp.
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (me.g == 0)
                *reinterpret_cast<float2*>(totals + me.strip * SIDE + 8 * j + 2 * me.q) =
                    make_float2(dL[j][0], dL[j][1]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float upper = __shfl_sync(ALL, dL[j][e], (me.lane + 4) & 31);
                const float lower = __shfl_sync(ALL, dL[j][e + 2], (me.lane + 4) & 31);
                dL[j][e] = me.g < 7 ? upper : lower;
                dL[j][e + 2] = me.g < 7 ? lower : 0.0f;
            }
        }
    }

    // dk, db: the writers' gradients
    {
        const float share = second ? 1.0f : facts[0];
        unsigned char *const left = second ? u : values, *const writer = second ? b_in : k_in;
        multiply_by_columns<F16>(x, left, dS, me);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 in = *reinterpret_cast<const float2*>(scales + 8 * j + 2 * me.q);
            const float2 out = *reinterpret_cast<const float2*>(scales + SIDE + 8 * j + 2 * me.q);
            const float scale[2] = {out.x * share, out.y * share};
#pragma unroll
            for (int e = 0; e < 4; ++e) x[j][e] *= scale[e & 1];
            // The gradient of what the chunk keeps of a column
            const float2 upper = unpack_bf16(*pair_at(writer, row, j, me));
            const float2 lower = unpack_bf16(*pair_at(writer, row + 8, j, me));
            float2 end = make_float2(fmaf(upper.x, x[j][0], lower.x * x[j][2]),
                                     fmaf(upper.y, x[j][1], lower.y * x[j][3]));
            if (j >> 2 == second)
#pragma unroll
                for (int below = 0; below < 2; ++below) {
                    const float2 s = unpack_f16(*pair_at(S, row + 8 * below, j, me));
                    const float2 ds = unpack_f16(*pair_at(dS, row + 8 * below, j, me));
                    end.x = fmaf(s.x * ds.x, in.x * out.x, end.x);
                    end.y = fmaf(s.y * ds.y, in.y * out.y, end.y);
                }
#pragma unroll
            for (int bits = 4; bits < 32; bits *= 2) {
                end.x += __shfl_xor_sync(ALL, end.x, bits);
                end.y += __shfl_xor_sync(ALL, end.y, bits);
            }
            if (me.g == 0)
                *reinterpret_cast<float2*>(ends + me.warp * SIDE + 8 * j + 2 * me.q) = end;
        }
        multiply_to_triangle<F16, BF16>(part, left, dy, true, true, share * facts[1], me);
        add_product<BF16>(x, part, r_in, me);
        multiply_to_triangle<F16, BF16>(part, left, dz, true, false, share, me);
        add_product<BF16>(x, part, a_in, me);
        const float half = 0.5f * (facts[5] - (second ? 0.0f : facts[3])), rest = exp2_approx(half);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int e = 2 * below;
                const float2 factor = unpack_bf16(*pair_at(writer, row + 8 * below, j, me));
                const float2 log = unpack_log(*log_at(logs, j, below, me), -log_unit, half);
                dL[j][e] = fmaf(-factor.x, x[j][e], dL[j][e]);
                dL[j][e + 1] = fmaf(-factor.y, x[j][e + 1], dL[j][e + 1]);
                x[j][e] = x[j][e] * exp2_approx(log.x) * rest;
                x[j][e + 1] = x[j][e + 1] * exp2_approx(log.y) * rest;
            }
        store_by_halves<BF16, 8>((second ? db : dk) + place->first, stride, stage, x, row, place->left, me);
    }

    // dw: l_t is part of L from t on, and of what the chunk keeps. Each group gives the other its
    // sums of that one's columns.
    __syncthreads();
    float2* const given = reinterpret_cast<float2*>(memory);  // by log_at
    NumbersOf<LaneOf<2>> mine;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const float* const low = dL[j] + 2 * below;
            const float* const high = dL[4 + j] + 2 * below;
            *log_at(given, 4 * !second + j, below, me) =
                second ? make_float2(low[0], low[1]) : make_float2(high[0], high[1]);
            mine[j][2 * below] = second ? high[0] : low[0];
            mine[j][2 * below + 1] = second ? high[1] : low[1];
        }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const float2 other = *log_at(given, 4 * second + j, below, me);
            mine[j][2 * below] += other.x, mine[j][2 * below + 1] += other.y;
        }
    accumulate_back(mine, own);
    if (me.g == 0)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float2* const at = reinterpret_cast<float2*>(totals + me.strip * SIDE + 8 * (own.piece + j) +
                                                         2 * me.q);
            *at = make_float2(mine[j][0] + at->x, mine[j][1] + at->y);
        }
    __syncthreads();
    const float scale = exp2_approx(facts[5]) * LN_2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float2 after = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 1; i < 12; ++i)  // dL of later warps, ends of all
            if (i >= 4 || i > me.strip) {
                const float* const row = i < 4 ? totals + i * SIDE : ends + (i - 4) * SIDE;
                const float2 part =
                    *reinterpret_cast<const float2*>(row + 8 * (own.piece + j) + 2 * me.q);
                after.x += part.x, after.y += part.y;
            }
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int e = 2 * below;
            const float2 step = log2_step(w + place->first, stride / 2, row + 8 * below, j, place->left, own);
            mine[j][e] = (mine[j][e] + after.x) * step.x * scale;
            mine[j][e + 1] = (mine[j][e + 1] + after.y) * step.y * scale;
        }
    }
    store_rows<BF16>(dw + place->first, stride, values, mine, row, place->left, own);
}
