// wkv6 for heads of 64 channels in bfloat16, in chunks of 64 tokens on tensor cores.
//
// The algebra is that of rwkv/ops/wkv6_triton_kernels.py: within a chunk that starts from S and ends
// with S', with l_t = -exp(w_t), P_t = l_1 + ... + l_(t-1) and Q_t = l_(t+1) + ... + l_C,
//
//     S' = S diag(e^L) + V^T (k e^Q)        y = (A + diag(r . u * k)) V + (r e^P) S^T
//     A[t, s] = sum_n r[t, n] k[s, n] e^(l[s + 1, n] + ... + l[t - 1, n])   for s < t
//
// The decay is a factor of each key column, so that any columns of S can be scanned alone: wkv6_scan
// walks them from chunk to chunk and makes on its way what a chunk adds; wkv6_reverse does the same
// with the gradient of S. wkv6_output and wkv6_gradient make outputs and gradients of all chunks at
// once.
//
// Where neither half of a chunk uses up more than 2^LIMIT, its middle serves as the point relative to
// which the weight of a pair is a factor of t times a factor of s; what carries such factors (`_in`)
// is bfloat16. A step that keeps less than 2^-ENOUGH counts as 2^-ENOUGH there: beside what a token
// writes itself both are nothing. Other chunks are left to wkv6_output_steep and
// wkv6_gradient_steep: of blocks of 64, 32 ... 2 tokens each pairs the upper half with the lower, and
// each factor is the decay between a token and the block's middle, at most 1. There a step keeps at
// least 2^-MOST. No sum that a gradient is made of has larger terms than its result there.
//
// A warp owns 16 of the 64 rows of every tile. Operands other than `_in` are scaled to about 1 by
// powers of two and float16, or bfloat16 as they came.
#include "chunks.cuh"

constexpr int STAGES = 3;        // chunks of a scan under way
constexpr float LIMIT = 96.0f;   // products of two factors are finite, or masked
constexpr float ENOUGH = 40.0f;
constexpr float MOST = 120.0f;   // 2^MOST times a tile scaled to 1 is a finite bfloat16

// l in units of log2 for a raw decay, at least -most.
__device__ __forceinline__ float log2_kept(float w, float most) {
    return fmaxf(-exp2_approx(fmaf(w, LOG2_E, LOG2_LOG2_E)), -most);
}

// What a chunk with so many tokens counts as the strongest decay of one. In a chunk that is not full
// no other token need be there to outweigh the gradient of a strong decay.
__device__ __forceinline__ float strongest(int left) { return left >= SIDE ? ENOUGH : MOST; }

// l of the warp's rows in place of w; 0 behind the sequence's end.
template <class Me>
__device__ __forceinline__ void log2_steps(NumbersOf<Me>& x, int row, int left, float most,
                                           const Me& me) {
#pragma unroll
    for (int j = 0; j < Me::J; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            x[j][e] = row + me.g + (e >> 1) * 8 < left ? log2_kept(x[j][e], most) : 0.0f;
}

template <class Me>
__device__ __forceinline__ void copy(NumbersOf<Me>& to, const NumbersOf<Me>& from, const Me&) {
#pragma unroll
    for (int j = 0; j < Me::J; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) to[j][e] = from[j][e];
}

template <int J>
__device__ __forceinline__ void scale_by(float (&x)[J][4], float scale) {
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[j][e] *= scale;
}

// Of four numbers of a head's parts of 16 columns the largest.
__device__ __forceinline__ float largest_of_parts(const float* x) {
    return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
}

// ---- scans: four warps, a group, own 16 key columns of one head's state, each 16 value rows ----

// Forward keys are k and values v, in reverse r and dy. The keys are split into two bfloat16, so that
// values stay as they came. Each strip of 16 tokens weighs its keys by the decay to its own end
// (start); what is under way decays from strip to strip, and S from chunk to chunk.
template <bool REVERSE>
__device__ __forceinline__ void scan(const uint16_t* keys, const uint16_t* w, const uint16_t* values,
                                     const float* initial, uint16_t* states, float* exponents,
                                     float* final, const int64_t* cu_seqlens, int T, int H) {
    DYNAMIC_TILES(memory);
    using Columns = LaneOf<4>;  // 16 columns
    const Lane me;
    const Columns narrow;
    const int groups = blockDim.x >> 7, group = me.warp >> 2, blocks = 4 / groups;
    const int64_t unit = blockIdx.x / blocks;
    const int q = unit / H, h = unit % H, row = 16 * me.strip;
    const int part = blockIdx.x % blocks * groups + group, column = 16 * part + 2 * me.q;
    const Sequence sequence = find_sequence(q, cu_seqlens, T);
    const int chunks = (sequence.length + SIDE - 1) / SIDE;
    const int64_t stride = static_cast<int64_t>(H) * SIDE;
    const int size = TILE + groups * 4096;  // of a stage
    float* const kept = reinterpret_cast<float*>(memory + STAGES * size) + group * 2 * 68;
    const auto chunk_of = [&](int i) { return REVERSE ? chunks - 1 - i : i; };

    // What this thread copies of a chunk: of v one piece in so many rows, of w and k one in all
    const int64_t first = (sequence.begin * H + h) * SIDE;
    const int value_row = threadIdx.x >> 3, value_step = blockDim.x >> 3;
    const int key_row = row + (me.lane >> 1);
    const uint16_t* const values_from = values + first + value_row * stride + (threadIdx.x & 7) * 8;
    const int64_t keys_from = first + key_row * stride + 16 * part + 8 * (me.lane & 1);
    const int values_to = place(value_row, threadIdx.x & 7);  // steps are whole groups of eight rows
    const int keys_to = TILE + group * 4096 + place_in_narrow(key_row, me.lane & 1);
    unsigned char* target = memory;
    const auto fetch = [&](int i) {
        if (i < chunks) {
            const int chunk = chunk_of(i), left = sequence.length - chunk * SIDE;
            const int64_t ahead = chunk * (SIDE * stride);
#pragma unroll 1
            for (int r = 0; r < SIDE; r += value_step) {
                const bool valid = value_row + r < left;
                cp_async_16(target + values_to + r * 128,
                            valid ? values_from + ahead + r * stride : values, valid);
            }
            const bool valid = key_row < left;
            cp_async_16(target + keys_to, valid ? w + keys_from + ahead : w, valid);
            cp_async_16(target + keys_to + 2048, valid ? keys + keys_from + ahead : keys, valid);
            target = target == memory + (STAGES - 1) * size ? memory : target + size;
        }
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) fetch(i);

    float S[2][4];
    const int64_t own = unit * SIDE * SIDE + (row + me.g) * SIDE + column;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const float2 pair =
                *reinterpret_cast<const float2*>(initial + own + 8 * below * SIDE + 8 * j);
            S[j][2 * below] = pair.x, S[j][2 * below + 1] = pair.y;
        }
    const unsigned char* const last = memory + (STAGES - 1) * size;
    unsigned char* stage = memory;
#pragma unroll 1
    for (int i = 0; i < chunks; ++i, stage = stage == last ? memory : stage + size) {
        const int chunk = chunk_of(i), left = sequence.length - chunk * SIDE;
        unsigned char* const high = stage + TILE + group * 4096;  // w becomes the keys' first part,
        unsigned char* const low = high + 2048;                   // and the keys their second
        float* const kept_now = kept + (i & 1) * 68;              // [4][16], of strips; four maxima
        cp_async_wait<STAGES - 2>();
        __syncwarp();
        float step[2][4], sum[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int t = row + me.g + 8 * below;
                const float2 pair = unpack_bf16(
                    *reinterpret_cast<const uint32_t*>(high + place_in_narrow(t, j) + me.q * 4));
                step[j][2 * below] = t < left ? log2_kept(pair.x, MOST) : 0.0f;
                step[j][2 * below + 1] = t < left ? log2_kept(pair.y, MOST) : 0.0f;
            }
        copy(sum, step, narrow);
        if (REVERSE)
            accumulate(sum, narrow);
        else
            accumulate_back(sum, narrow);
        const float most = largest_of_warp(largest(S));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (me.g == (REVERSE ? 7 : 0))
                *reinterpret_cast<float2*>(kept_now + me.strip * 16 + 8 * j + 2 * me.q) = make_float2(
                    exp2_approx(sum[j][REVERSE ? 2 : 0]), exp2_approx(sum[j][REVERSE ? 3 : 1]));
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int at = place_in_narrow(row + me.g + 8 * below, j) + me.q * 4;
                const int e = 2 * below;
                float2 key = unpack_bf16(*reinterpret_cast<const uint32_t*>(low + at));
                key.x *= exp2_approx(sum[j][e] - step[j][e]);
                key.y *= exp2_approx(sum[j][e + 1] - step[j][e + 1]);
                const uint32_t bits = pack_bf16(key.x, key.y);
                const float2 rounded = unpack_bf16(bits);
                *reinterpret_cast<uint32_t*>(high + at) = bits;
                *reinterpret_cast<uint32_t*>(low + at) =
                    pack_bf16(key.x - rounded.x, key.y - rounded.y);
            }
        }
        if (me.lane == 0) kept_now[64 + me.strip] = most;
        __syncthreads();
        fetch(i + STAGES - 1);

        const int64_t one = (sequence.slot + chunk) * H + h;
        const float exponent = exponent_below(largest_of_parts(kept_now + 64));
        const float scale = power_of(-exponent);
        uint16_t* const keep = states + one * SIDE * SIDE + (row + me.g) * SIDE + column;
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int below = 0; below < 2; ++below)
                *reinterpret_cast<uint32_t*>(keep + 8 * below * SIDE + 8 * j) =
                    pack_f16(S[j][2 * below] * scale, S[j][2 * below + 1] * scale);
        if (me.strip == 0 && me.lane == 0) exponents[one * 4 + part] = exponent;

        float added[2][4], all[2][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
        clear(added);
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {
            const int strip = REVERSE ? 3 - n : n;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float2 part_kept =
                    *reinterpret_cast<const float2*>(kept_now + strip * 16 + 8 * j + 2 * me.q);
                all[j][0] *= part_kept.x, all[j][1] *= part_kept.y;
                added[j][0] *= part_kept.x, added[j][1] *= part_kept.y;
                added[j][2] *= part_kept.x, added[j][3] *= part_kept.y;
            }
            uint32_t a[4], b[4];
            left_columns(a, stage, 16 * strip, row, me);
            right_block(b, high + 512 * strip, me);
            mma_bf16(added[0], a, b);
            mma_bf16(added[1], a, b + 2);
            right_block(b, low + 512 * strip, me);
            mma_bf16(added[0], a, b);
            mma_bf16(added[1], a, b + 2);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) S[j][e] = fmaf(S[j][e], all[j][e & 1], added[j][e]);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below)
            *reinterpret_cast<float2*>(final + own + 8 * below * SIDE + 8 * j) =
                make_float2(S[j][2 * below], S[j][2 * below + 1]);
}

extern "C" __global__ void __launch_bounds__(512, LARGE_BLOCKS)
    wkv6_scan(const uint16_t* k, const uint16_t* w, const uint16_t* v, const float* initial,
              uint16_t* states, float* exponents, float* final, const int64_t* cu_seqlens, int T,
              int H) {
    scan<false>(k, w, v, initial, states, exponents, final, cu_seqlens, T, H);
}

extern "C" __global__ void __launch_bounds__(512, LARGE_BLOCKS)
    wkv6_reverse(const uint16_t* r, const uint16_t* w, const uint16_t* grad_y, const float* grad_final,
                 uint16_t* grad_states, float* grad_exponents, float* grad_initial,
                 const int64_t* cu_seqlens, int T, int H) {
    scan<true>(r, w, grad_y, grad_final, grad_states, grad_exponents, grad_initial, cu_seqlens, T, H);
}

// ---- what outputs and gradients of a chunk have in common ----

// Sums of l over each strip, for own columns; the warp's sums up to each row.
template <class Me>
__device__ __forceinline__ void sum_strips(float* sums, const NumbersOf<Me>& sum, const Me& me) {
    if (me.g == 7)
#pragma unroll
        for (int j = 0; j < Me::J; ++j)
            *reinterpret_cast<float2*>(sums + me.strip * SIDE + 8 * (me.piece + j) + 2 * me.q) =
                make_float2(sum[j][2], sum[j][3]);
}

// Whether a half of the chunk uses up too much for its middle to serve; of every warp the same.
__device__ __forceinline__ bool too_steep(const float* sums, int lane) {
    float2 s[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = *reinterpret_cast<const float2*>(sums + i * SIDE + 2 * lane);
    const float first = fminf(s[0].x + s[1].x, s[0].y + s[1].y);
    const float second = fminf(s[2].x + s[3].x, s[2].y + s[3].y);
    return largest_of_warp(-fminf(first, second)) > LIMIT;
}

// Of the columns s and s + 1 in a row t, as halves of a word, those that pair with t at the level of
// blocks of 2 `half` tokens.
__device__ __forceinline__ uint32_t level_pairs(int t, int s, int half) {
    return (((t ^ s) & -half) == half ? 0xffffu : 0u) |
           (((t ^ (s + 1)) & -half) == half ? 0xffff0000u : 0u);
}

// The middle of the block of 2 `half` tokens around t.
__device__ __forceinline__ int middle_of(int t, int half) { return (t & -2 * half) + half; }

// Sums of l relative to the chunk's middle up to token t, and before the first, for columns
// 8 j + 2 q and the next; written by log_at.
__device__ __forceinline__ float2 log_through(const float2* logs, const float* middles, int t, int j,
                                              int q) {
    if (t < 0) {
        const float2 middle = *reinterpret_cast<const float2*>(middles + 8 * j + 2 * q);
        return make_float2(-middle.x, -middle.y);
    }
    return logs[((t >> 4) * 16 + 2 * j + (t >> 3 & 1)) * 32 + (t & 7) * 4 + q];
}

// log2 of the decay between token t and the middle of its block of 2 `half` tokens, not counting t
// itself: before t if that is in the upper half, else after it.
__device__ __forceinline__ float2 log_to_middle(const float2* logs, const float* middles, int t,
                                                int half, int j, int q) {
    const float2 middle = log_through(logs, middles, middle_of(t, half) - 1, j, q);
    const float2 own = log_through(logs, middles, t & half ? t - 1 : t, j, q);
    return t & half ? make_float2(fminf(own.x - middle.x, 0.0f), fminf(own.y - middle.y, 0.0f))
                    : make_float2(fminf(middle.x - own.x, 0.0f), fminf(middle.y - own.y, 0.0f));
}

// Of the warp's rows and own columns, r of upper and k of lower halves with their decay to the middle.
template <class Me>
__device__ __forceinline__ void make_level(unsigned char* to, unsigned char* r, unsigned char* k,
                                           const float2* logs, const float* middles, int half,
                                           float r_exponent, float k_exponent, const Me& me) {
    const int row = 16 * me.strip;
#pragma unroll 1
    for (int j = 0; j < Me::J; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int t = row + me.g + 8 * below;
            const float2 log = log_to_middle(logs, middles, t, half, me.piece + j, me.q);
            const bool upper = t & half;
            const float2 pair = unpack_bf16(*pair_at(upper ? r : k, row + 8 * below, j, me));
            const float exponent = upper ? r_exponent : k_exponent;
            *pair_at(to, row + 8 * below, j, me) = pack_bf16(
                pair.x * exp2_approx(log.x - exponent), pair.y * exp2_approx(log.y - exponent));
        }
}

// What stands on the diagonal of the warp's rows g and g + 8 of a product, to the sum of two operands
// that are zero there.
__device__ __forceinline__ void put_diagonal(Operand& high, Operand& low, const float x[2],
                                             const Lane& me) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        const uint32_t bits = pack_bf16(x[below], 0.0f);
        const uint32_t rest = pack_bf16(x[below] - unpack_bf16(bits).x, 0.0f);
        const int shift = me.q != me.g >> 1 ? 32 : me.g & 1 ? 16 : 0;
        const uint32_t first = shift == 32 ? 0 : bits << shift, second = shift == 32 ? 0 : rest << shift;
#pragma unroll
        for (int j = below; j < 8; j += 2) {
            const uint32_t here = j >> 1 == me.strip ? ALL : 0u;
            high[j >> 1][(j & 1) * 2 + below] |= first & here;
            low[j >> 1][(j & 1) * 2 + below] |= second & here;
        }
    }
}

// The steep ones among all chunks, for blocks that share them.
template <class Work>
__device__ __forceinline__ void for_each_steep(const int* steep, int64_t units, int lane, Work work) {
    for (int64_t base = blockIdx.x; base < units; base += static_cast<int64_t>(gridDim.x) * 32) {
        const int64_t mine = base + static_cast<int64_t>(lane) * gridDim.x;
        const int found = mine < units ? steep[mine] : 0;
#pragma unroll 1
        for (int i = 0; i < 32; ++i)
            if (__shfl_sync(ALL, found, i) == 1) {
                __syncthreads();
                work(base + static_cast<int64_t>(i) * gridDim.x);
            }
    }
}

// ---- outputs: four warps a chunk ----

struct Outputs {
    const uint16_t *r, *w, *k, *v, *u, *states;
    const float* exponents;
    uint16_t* y;
    int* steep;
};

template <bool STEEP>
__device__ __forceinline__ void make_outputs(unsigned char* memory, const Outputs& to, int64_t unit,
                                             int h, const Chunk& chunk, int H) {
    unsigned char *const r = memory, *const k = memory + TILE, *const values = memory + 2 * TILE,
                         *const S = memory + 3 * TILE, *const r_start = memory + 4 * TILE,
                         *const level = memory + 5 * TILE;
    float2* const logs = reinterpret_cast<float2*>(memory + 6 * TILE);
    float* const sums = reinterpret_cast<float*>(memory + (STEEP ? 8 : 5) * TILE);  // [4][64]
    float* const middles = sums + 4 * SIDE;
    float* const maxima = middles + SIDE;
    const Lane me;
    const int row = 16 * me.strip;
    const int64_t first = (chunk.first * H + h) * SIDE, stride = static_cast<int64_t>(H) * SIDE * 2;
    fetch_rows(r_start, to.w + first, stride, row, chunk.left, me);
    fetch_rows(r, to.r + first, stride, row, chunk.left, me);
    fetch_rows(k, to.k + first, stride, row, chunk.left, me);
    cp_async_commit();
    fetch_rows(values, to.v + first, stride, row, chunk.left, me);
    fetch_rows(S, to.states + unit * SIDE * SIDE, 2 * SIDE, row, SIDE, me);
    cp_async_commit();
    const float* const S_exponents = to.exponents + unit * 4;
    const float S_most = largest_of_parts(S_exponents);
    cp_async_wait<1>();
    __syncwarp();

    Numbers step, L;
    read_rows<BF16>(L, r, row, me);
    const float most = largest_of_warp(largest(L));
    read_rows<BF16>(step, r_start, row, me);
    log2_steps(step, row, chunk.left, STEEP ? MOST : strongest(chunk.left), me);
    copy(L, step, me);
    accumulate(L, me);
    sum_strips(sums, L, me);
    if (me.lane == 0) maxima[me.strip] = most;
    cp_async_wait<0>();
    __syncthreads();
    if (!STEEP) {
        const bool left_out = too_steep(sums, me.lane);
        if (threadIdx.x == 0) to.steep[unit] = left_out;
        if (left_out) return;
    }

    const float er = exponent_below(largest_of_parts(maxima));
    float bonus[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const Halves l(sums, j, me);
        const float2 u = unpack_bf16(
            *reinterpret_cast<const uint32_t*>(to.u + h * SIDE + 8 * j + 2 * me.q));
        const float at_start = S_exponents[j >> 1] - S_most - er;
        const float in[2] = {exp2_approx(l.middle[0] + at_start), exp2_approx(l.middle[1] + at_start)};
        if (STEEP && me.strip == 0 && me.g == 0)
            *reinterpret_cast<float2*>(middles + 8 * j + 2 * me.q) =
                make_float2(l.middle[0], l.middle[1]);
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int t = row + 8 * below, e = 2 * below;
            const float L0 = L[j][e] + (l.before[0] - l.middle[0]);
            const float L1 = L[j][e + 1] + (l.before[1] - l.middle[1]);
            float2 reader = unpack_bf16(*pair_at(r, t, j, me));
            const float2 key = unpack_bf16(*pair_at(k, t, j, me));
            bonus[below] = fmaf(reader.x * u.x, key.x, fmaf(reader.y * u.y, key.y, bonus[below]));
            if (STEEP) {
                *log_at(logs, j, below, me) = make_float2(L0, L1);
                reader.x *= exp2_approx(L[j][e] + l.before[0] - step[j][e] + at_start);
                reader.y *= exp2_approx(L[j][e + 1] + l.before[1] - step[j][e + 1] + at_start);
                *pair_at(r_start, t, j, me) = pack_f16(reader.x, reader.y);
            } else {
                reader.x *= exp2_approx(L0 - step[j][e]);
                reader.y *= exp2_approx(L1 - step[j][e + 1]);
                *pair_at(r, t, j, me) = pack_bf16(reader.x, reader.y);
                *pair_at(r_start, t, j, me) = pack_f16(reader.x * in[0], reader.y * in[1]);
                *pair_at(k, t, j, me) = pack_bf16(key.x * exp2_approx(-L0), key.y * exp2_approx(-L1));
            }
        }
    }
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        bonus[below] += __shfl_xor_sync(ALL, bonus[below], 1);
        bonus[below] += __shfl_xor_sync(ALL, bonus[below], 2);
    }
    group_fence();
    __syncthreads();

    // A with the bonus on its diagonal, as the sum of two bfloat16
    Numbers x;
    Operand high, low;
    if (STEEP) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int n = 0; n < 4; ++n) high[i][n] = low[i][n] = 0;
#pragma unroll 1
        for (int half = SIDE / 2; half > 0; half >>= 1) {
            make_level(level, r, k, logs, middles, half, 0.0f, 0.0f, me);
            group_fence();
            __syncthreads();
            multiply_by_rows<BF16>(x, level, level, me);
            __syncthreads();
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int below = 0; below < 2; ++below) {
                    const int t = row + me.g + 8 * below, e = 2 * below;
                    const uint32_t pairs = t & half ? level_pairs(t, 8 * j + 2 * me.q, half) : 0;
                    const uint32_t bits = pack_bf16(x[j][e], x[j][e + 1]);
                    const float2 rounded = unpack_bf16(bits);
                    high[j >> 1][(j & 1) * 2 + below] |= bits & pairs;
                    low[j >> 1][(j & 1) * 2 + below] |=
                        pack_bf16(x[j][e] - rounded.x, x[j][e + 1] - rounded.y) & pairs;
                }
        }
    } else {
        multiply_by_rows<BF16>(x, r, k, me);
        pack_triangle<BF16>(high, x, false, false, 1.0f, me);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const float2 rounded = unpack_bf16(high[j >> 1][(j & 1) * 2 + below]);
                x[j][2 * below] -= rounded.x, x[j][2 * below + 1] -= rounded.y;
            }
        pack_triangle<BF16>(low, x, false, false, 1.0f, me);
    }
    put_diagonal(high, low, bonus, me);

    multiply_by_rows<F16>(x, r_start, S, me);
    scale_by(x, exp2_approx(er + S_most));
    add_product<BF16>(x, high, values, me);
    add_product<BF16>(x, low, values, me);
    __syncthreads();
    store_rows<BF16>(to.y + first, stride, r_start, x, row, chunk.left, me);
}

extern "C" __global__ void __launch_bounds__(128, 2 * LARGE_BLOCKS)
    wkv6_output(const uint16_t* r, const uint16_t* w, const uint16_t* k, const uint16_t* v,
                const uint16_t* u, const uint16_t* states, const float* exponents, uint16_t* y,
                int* steep, const int* owners, const int64_t* cu_seqlens, int T, int H) {
    DYNAMIC_TILES(memory);
    const Chunk chunk = find_chunk(blockIdx.x / H, owners, cu_seqlens, T);
    if (chunk.left <= 0) {
        if (threadIdx.x == 0) steep[blockIdx.x] = 0;
        return;
    }
    make_outputs<false>(memory, {r, w, k, v, u, states, exponents, y, steep}, blockIdx.x,
                        blockIdx.x % H, chunk, H);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    wkv6_output_steep(const uint16_t* r, const uint16_t* w, const uint16_t* k, const uint16_t* v,
                      const uint16_t* u, const uint16_t* states, const float* exponents, uint16_t* y,
                      int* steep, const int* owners, const int64_t* cu_seqlens, int slots, int T,
                      int H) {
    DYNAMIC_TILES(memory);
    for_each_steep(steep, static_cast<int64_t>(slots) * H, threadIdx.x & 31, [&](int64_t unit) {
        make_outputs<true>(memory, {r, w, k, v, u, states, exponents, y, steep}, unit, unit % H,
                           find_chunk(unit / H, owners, cu_seqlens, T), H);
    });
}

// ---- gradients: two groups of four warps a chunk ----

struct Gradients {
    const uint16_t *r, *w, *k, *v, *u, *grad_y, *states;
    const float* exponents;
    const uint16_t* grad_states;
    const float* grad_exponents;
    uint16_t *dr, *dw, *dk, *dv;
    float* du;
};

// The part of a sum over tokens in a column pair that one row of a product's left operand makes: ones
// for tokens s and s + 1 behind t if `behind`, else before it, in the same block of `size` tokens.
__device__ __forceinline__ uint32_t ones_beside(int t, int s, int size, bool behind) {
    const auto one = [&](int s) {
        return ((t ^ s) & -size) == 0 && (behind ? s > t : s < t) ? 0x3f80u : 0u;
    };
    return one(s) | one(s + 1) << 16;
}

// sum += what the tokens of `tile` (bfloat16) add up to behind or before each of the warp's rows.
template <class Which>
__device__ __forceinline__ void add_sums(NumbersOf<LaneOf<2>>& sum, unsigned char* tile, int size,
                                         Which behind, const LaneOf<2>& me) {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
        const int t = 16 * me.strip + me.g, s = 16 * i + 2 * me.q;
        const uint32_t a[4] = {ones_beside(t, s, size, behind(t)),
                               ones_beside(t + 8, s, size, behind(t + 8)),
                               ones_beside(t, s + 8, size, behind(t)),
                               ones_beside(t + 8, s + 8, size, behind(t + 8))};
        add_step<BF16>(sum, a, tile, 16 * i, me);
    }
}

// Numbers of one row a lane times two numbers a row; own columns of pairs.
__device__ __forceinline__ void add_over_rows(float2& sum) {
#pragma unroll
    for (int bits = 4; bits < 32; bits *= 2) {
        sum.x += __shfl_xor_sync(ALL, sum.x, bits);
        sum.y += __shfl_xor_sync(ALL, sum.y, bits);
    }
}

// Tiles are in units of powers of two: r, k, v and dy of their own, S of 2^eu together with k v, dS of
// 2^ez together with r dy, so that all shares of the gradient of l have one unit, 2^(eu + ez). The
// gradient of a factor, times that factor, is its share; the factor is the rounded operand of the
// products, so that what must cancel cancels.
template <bool STEEP>
__device__ __forceinline__ void make_gradients(unsigned char* memory, const Gradients& to,
                                               int64_t unit, int h, const Chunk& chunk, int H) {
    unsigned char *const r = memory, *const k = memory + TILE, *const values = memory + 2 * TILE,
                         *const dy = memory + 3 * TILE, *const S = memory + 4 * TILE,
                         *const dS = memory + 5 * TILE, *const k_end = memory + 6 * TILE,
                         *const r_in = memory + 9 * TILE, *const k_in = memory + 10 * TILE;
    float2* const logs = reinterpret_cast<float2*>(memory + 7 * TILE);  // by log_at
    float* const sums = reinterpret_cast<float*>(memory + 11 * TILE);   // [4][64]
    float* const totals = sums + 4 * SIDE;                              // [12][64]
    float* const du_sums = totals + 12 * SIDE;                          // [4][64]
    float* const scales = du_sums + 4 * SIDE;   // of columns: to the chunk's start, to its end
    float* const middles = scales + 2 * SIDE;   // of columns: l up to the chunk's middle
    float* const rows = middles + SIDE;         // of tokens: v dy and r u k, each of two halves
    float* const maxima = rows + 4 * SIDE;      // [4][8]
    float* const facts = maxima + 32;           // read again where needed: registers are short
    // Two groups of four warps: the first makes dr, the second dv and dk. Of what they do for all
    // (`own`) each has 32 columns.
    const Lane me;
    const LaneOf<2> own;
    const bool second = __shfl_sync(ALL, me.warp, 0) >= 4;  // the compiler sees it is the warp's
    const int row = 16 * me.strip;
    const int64_t first = (chunk.first * H + h) * SIDE, stride = static_cast<int64_t>(H) * SIDE * 2;
    const float most = STEEP ? MOST : strongest(chunk.left);
    fetch_rows(k_end, to.w + first, stride, row, chunk.left, own);
    fetch_rows(r, to.r + first, stride, row, chunk.left, own);
    fetch_rows(k, to.k + first, stride, row, chunk.left, own);
    fetch_rows(values, to.v + first, stride, row, chunk.left, own);
    fetch_rows(dy, to.grad_y + first, stride, row, chunk.left, own);
    cp_async_commit();
    fetch_rows(S, to.states + unit * SIDE * SIDE, 2 * SIDE, row, SIDE, own);
    fetch_rows(dS, to.grad_states + unit * SIDE * SIDE, 2 * SIDE, row, SIDE, own);
    cp_async_commit();
    const float* const S_exponents = to.exponents + unit * 4;
    const float* const dS_exponents = to.grad_exponents + unit * 4;
    cp_async_wait<1>();
    __syncwarp();

    NumbersOf<LaneOf<2>> step, L;
    {
        unsigned char* const sized[4] = {r, k, values, dy};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            read_rows<BF16>(L, sized[i], row, own);
            const float found = largest_of_warp(largest(L));
            if (me.lane == 0) maxima[8 * i + me.warp] = found;
        }
    }
    read_rows<BF16>(step, k_end, row, own);
    log2_steps(step, row, chunk.left, most, own);
    copy(L, step, own);
    accumulate(L, own);
    sum_strips(sums, L, own);
    __syncthreads();

    float exponent[4];  // of r, k, v and dy
#pragma unroll
    for (int i = 0; i < 4; ++i)
        exponent[i] = exponent_below(largest_of_warp(maxima[8 * i + (me.lane & 7)]));
    const float er = exponent[0], ek = exponent[1], ev = exponent[2], ey = exponent[3];
    const float eu = fmaxf(ek + ev, largest_of_parts(S_exponents));
    const float ez = fmaxf(er + ey, largest_of_parts(dS_exponents));
    if (threadIdx.x == 0) {
        facts[0] = power_of(ek + ev - eu), facts[1] = power_of(er + ey - ez);
        facts[2] = exp2_approx(ey + eu), facts[3] = exp2_approx(ev + ez);
        facts[4] = exp2_approx(ek + ez), facts[5] = power_of(ey);
        facts[6] = exp2_approx(eu + ez) * LN_2, facts[7] = most;
        if (STEEP) facts[8] = er, facts[9] = ek, facts[10] = eu, facts[11] = ez;
    }
    {
        const float r_scale = power_of(-er), k_scale = power_of(-ek);
        const float v_scale = power_of(-ev), y_scale = power_of(-ey);
        float flow[2] = {0.0f, 0.0f}, bonus[2] = {0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Halves l(sums, j, own);
            const int part = (own.piece + j) >> 1, column = 8 * (own.piece + j) + 2 * me.q;
            const float2 u =
                unpack_bf16(*reinterpret_cast<const uint32_t*>(to.u + h * SIDE + column));
            const float at_start = S_exponents[part] - eu, at_end = dS_exponents[part] - ez;
            const float out[2] = {exp2_approx(l.rest[0] + at_end), exp2_approx(l.rest[1] + at_end)};
            if (me.strip == 0 && me.g == 0) {
                *reinterpret_cast<float2*>(scales + column) = make_float2(
                    exp2_approx(l.middle[0] + at_start), exp2_approx(l.middle[1] + at_start));
                *reinterpret_cast<float2*>(scales + SIDE + column) = make_float2(out[0], out[1]);
                *reinterpret_cast<float2*>(middles + column) = make_float2(l.middle[0], l.middle[1]);
            }
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int t = row + 8 * below, e = 2 * below;
                const float L0 = L[j][e] + (l.before[0] - l.middle[0]);
                const float L1 = L[j][e + 1] + (l.before[1] - l.middle[1]);
                *log_at(logs, 4 * second + j, below, me) = make_float2(L0, L1);
                const float2 reader = unpack_bf16(*pair_at(r, t, j, own));
                const float2 key = unpack_bf16(*pair_at(k, t, j, own));
                bonus[below] = fmaf(reader.x * u.x, key.x, fmaf(reader.y * u.y, key.y, bonus[below]));
                if (STEEP) {
                    *pair_at(k_end, t, j, own) =
                        pack_f16(key.x * k_scale * exp2_approx(l.rest[0] - L0 + at_end),
                                 key.y * k_scale * exp2_approx(l.rest[1] - L1 + at_end));
                } else {
                    // Scales first: a factor of both may be infinite
                    *pair_at(r_in, t, j, own) =
                        pack_bf16(reader.x * r_scale * exp2_approx(L0 - step[j][e]),
                                  reader.y * r_scale * exp2_approx(L1 - step[j][e + 1]));
                    const float in0 = key.x * k_scale * exp2_approx(-L0);
                    const float in1 = key.y * k_scale * exp2_approx(-L1);
                    *pair_at(k_in, t, j, own) = pack_bf16(in0, in1);
                    *pair_at(k_end, t, j, own) = pack_f16(in0 * out[0], in1 * out[1]);
                }
                const float2 value = unpack_bf16(*pair_at(values, t, j, own));
                const float2 grad = unpack_bf16(*pair_at(dy, t, j, own));
                flow[below] = fmaf(value.x, grad.x, fmaf(value.y, grad.y, flow[below]));
                *pair_at(values, t, j, own) = pack_f16(value.x * v_scale, value.y * v_scale);
                *pair_at(dy, t, j, own) = pack_f16(grad.x * y_scale, grad.y * y_scale);
            }
        }
#pragma unroll
        for (int below = 0; below < 2; ++below) {
#pragma unroll
            for (int bits = 1; bits < 4; bits *= 2) {
                flow[below] += __shfl_xor_sync(ALL, flow[below], bits);
                bonus[below] += __shfl_xor_sync(ALL, bonus[below], bits);
            }
            if (me.q == 0) {
                rows[second * SIDE + row + me.g + 8 * below] = flow[below];
                rows[(2 + second) * SIDE + row + me.g + 8 * below] = bonus[below];
            }
        }
    }
    cp_async_wait<0>();
    group_fence();
    __syncthreads();

    unsigned char* const stage = k_end + 1024 * me.warp;  // once the second group has read k_end
    // dl: of the warp's rows, or if STEEP of its own columns
    Numbers x, dL;
    NumbersOf<LaneOf<2>> dl;
    Operand part, written;  // part of dA or dA^T; A^T
    if (STEEP) {
        clear(dl);
        clear(dL);  // here dr or dk
        Operand pairs;
        multiply_by_rows<F16>(x, second ? values : dy, second ? dy : values, me);
        scale_by(x, facts[second]);
        pack<BF16>(pairs, x);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int n = 0; n < 4; ++n) written[i][n] = 0;
#pragma unroll 1
        for (int half = SIDE / 2; half > 0; half >>= 1) {
            make_level(r_in, r, k, logs, middles, half, facts[8], facts[9], own);
            group_fence();
            __syncthreads();
            if (second) multiply_by_rows<BF16>(x, r_in, r_in, me);
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int below = 0; below < 2; ++below) {
                    const int t = row + me.g + 8 * below, at = (j & 1) * 2 + below;
                    const uint32_t which = (t & half ? 1 : 0) != second
                                               ? level_pairs(t, 8 * j + 2 * me.q, half)
                                               : 0;
                    part[j >> 1][at] = pairs[j >> 1][at] & which;
                    if (second)
                        written[j >> 1][at] |=
                            pack_f16(x[j][2 * below] * facts[1], x[j][2 * below + 1] * facts[1]) & which;
                }
            clear(x);
            add_product<BF16>(x, part, r_in, me);
            const float share = facts[!second];
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int t = row + me.g + 8 * below, e = 2 * below;
                if ((t & half ? 1 : 0) != second)
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        const float2 log = log_to_middle(logs, middles, t, half, j, me.q);
                        const float2 factor = unpack_bf16(*pair_at(r_in, row + 8 * below, j, me));
                        *pair_at(k_in, row + 8 * below, j, me) = pack_bf16(
                            x[j][e] * factor.x * share, x[j][e + 1] * factor.y * share);
                        dL[j][e] = fmaf(x[j][e], exp2_approx(log.x), dL[j][e]);
                        dL[j][e + 1] = fmaf(x[j][e + 1], exp2_approx(log.y), dL[j][e + 1]);
                    }
            }
            __syncthreads();
            add_sums(dl, k_in, half, [&](int t) { return (t & half) != 0; }, own);
        }
    }

    if (second) {
        Numbers grad_v;
        multiply_by_rows<F16>(grad_v, k_end, dS, me);
        named_barrier_arrive(3, 256);
        if (!STEEP) multiply_to_triangle<BF16, F16>(written, k_in, r_in, true, false, facts[1], me);
        add_product<F16>(grad_v, written, dy, me);
        const float scale = facts[4], y_scale = facts[5];
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int t = row + me.g + 8 * below, e = 2 * below;
            const float bonus = (rows[2 * SIDE + t] + rows[3 * SIDE + t]) * y_scale;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float2 grad = unpack_f16(*pair_at(dy, row + 8 * below, j, me));
                grad_v[j][e] = fmaf(grad_v[j][e], scale, bonus * grad.x);
                grad_v[j][e + 1] = fmaf(grad_v[j][e + 1], scale, bonus * grad.y);
            }
        }
        named_barrier_sync(2, 128);
        store_by_halves<BF16>(to.dv + first, stride, stage, grad_v, row, chunk.left, me);
    }

    // dr or dk, and their shares of the gradient of l: r is read behind the decays of the tokens before
    // it, k is written before those of the tokens behind it
    multiply_by_columns<F16>(x, second ? values : dy, second ? dS : S, me);
    const float share = facts[!second];
    if (STEEP) {
        // What is read from the state at the start, and what is left in that at the end
        unsigned char *const at_ends = second ? r_in : k_in, *const own_tile = second ? k : r;
        const float* const parts = second ? dS_exponents : S_exponents;
        const float unit_of = facts[10 + second], own_exponent = facts[8 + second];
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const Halves l(sums, j, me);
            const float at = parts[j >> 1] - unit_of;
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int t = row + me.g + 8 * below, e = 2 * below;
                const float2 log = log_through(logs, middles, second ? t : t - 1, j, me.q);
                x[j][e] *= exp2_approx((second ? l.rest[0] - log.x : log.x + l.middle[0]) + at);
                x[j][e + 1] *= exp2_approx((second ? l.rest[1] - log.y : log.y + l.middle[1]) + at);
                const float2 factor = unpack_bf16(*pair_at(own_tile, row + 8 * below, j, me));
                const float factor_scale = power_of(-own_exponent) * share;
                *pair_at(at_ends, row + 8 * below, j, me) = pack_bf16(
                    x[j][e] * factor.x * factor_scale, x[j][e + 1] * factor.y * factor_scale);
                x[j][e] += dL[j][e], x[j][e + 1] += dL[j][e + 1];
            }
        }
        __syncthreads();
        add_sums(dl, k_in, SIDE, [](int) { return true; }, own);
        add_sums(dl, r_in, SIDE, [](int) { return false; }, own);
        scale_by(x, facts[2 + second]);
    } else {
        unsigned char *const other = second ? r_in : k_in, *const factor = second ? k_in : r_in;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 scale =
                *reinterpret_cast<const float2*>(scales + second * SIDE + 8 * j + 2 * me.q);
            const float by[2] = {scale.x, scale.y};
#pragma unroll
            for (int e = 0; e < 4; ++e) x[j][e] *= by[e & 1];
            if (second) {
                const float2 upper = unpack_bf16(*pair_at(factor, row, j, me));
                const float2 lower = unpack_bf16(*pair_at(factor, row + 8, j, me));
                float2 end = make_float2(fmaf(upper.x, x[j][0], lower.x * x[j][2]) * share,
                                         fmaf(upper.y, x[j][1], lower.y * x[j][3]) * share);
                add_over_rows(end);
                if (me.g == 0)
                    *reinterpret_cast<float2*>(totals + me.warp * SIDE + 8 * j + 2 * me.q) = end;
            }
        }
        multiply_to_triangle<F16, BF16>(part, second ? values : dy, second ? dy : values, second, false,
                                        facts[second], me);
        add_product<BF16>(x, part, other, me);
        const float grow = facts[2 + second], weight = facts[!second];
        // L of the row above for r, of the same row for k
        const float2* seen[2] = {log_at(logs, 0, 0, me), log_at(logs, 0, 1, me)};
        int apart = 64;
        if (!second) {
            if (me.g > 0) {
                seen[0] -= 4, seen[1] -= 4;
            } else {
                seen[1] = seen[0] + 28;
                apart = me.strip == 0 ? 4 : 64;
                seen[0] = me.strip == 0 ? reinterpret_cast<const float2*>(middles) + me.q
                                        : seen[0] - 15 * 32 + 28;
            }
        }
        const float sign = !second && me.strip == 0 && me.g == 0 ? -1.0f : 1.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int e = 2 * below;
                const float2 by = unpack_bf16(*pair_at(factor, row + 8 * below, j, me));
                dL[j][e] = by.x * x[j][e] * weight;
                dL[j][e + 1] = by.y * x[j][e + 1] * weight;
                float2 L = seen[below][(below ? 64 : apart) * j];
                if (below == 0) L.x *= sign, L.y *= sign;
                x[j][e] = x[j][e] * exp2_approx(second ? -L.x : L.x) * grow;
                x[j][e + 1] = x[j][e + 1] * exp2_approx(second ? -L.y : L.y) * grow;
            }
    }

    // The current token's own part
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float2 u =
            unpack_bf16(*reinterpret_cast<const uint32_t*>(to.u + h * SIDE + 8 * j + 2 * me.q));
        float2 sum = make_float2(0.0f, 0.0f), kept = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int t = row + me.g + 8 * below, e = 2 * below;
            const float flow = rows[t] + rows[SIDE + t];
            const float2 other = unpack_bf16(*pair_at(second ? r : k, row + 8 * below, j, me));
            x[j][e] = fmaf(flow * u.x, other.x, x[j][e]);
            x[j][e + 1] = fmaf(flow * u.y, other.y, x[j][e + 1]);
            if (!second) {
                const float2 reader = unpack_bf16(*pair_at(r, row + 8 * below, j, me));
                sum.x = fmaf(flow * reader.x, other.x, sum.x);
                sum.y = fmaf(flow * reader.y, other.y, sum.y);
                const float2 s = unpack_f16(*pair_at(S, row + 8 * below, j, me));
                const float2 ds = unpack_f16(*pair_at(dS, row + 8 * below, j, me));
                kept.x = fmaf(s.x, ds.x, kept.x), kept.y = fmaf(s.y, ds.y, kept.y);
            }
        }
        if (!second) {
            add_over_rows(sum);
            add_over_rows(kept);
            if (me.g == 0) {
                const int column = 8 * j + 2 * me.q;
                const float2 in = *reinterpret_cast<const float2*>(scales + column);
                const float2 out = *reinterpret_cast<const float2*>(scales + SIDE + column);
                *reinterpret_cast<float2*>(du_sums + me.strip * SIDE + column) = sum;
                // The gradient of what the chunk keeps of a column
                *reinterpret_cast<float2*>(totals + (8 + me.strip) * SIDE + column) =
                    make_float2(kept.x * in.x * out.x, kept.y * in.y * out.y);
            }
        }
    }
    if (!second) named_barrier_sync(3, 256);
    store_by_halves<BF16>((second ? to.dk : to.dr) + first, stride, stage, x, row, chunk.left, me);

    // dw. Relative to the middle, l_t is part of the weights of all later readers, less those of all
    // writers from t on, and of all that is left at the end. Each group gives the other its shares of
    // that one's columns.
    __syncthreads();
    NumbersOf<LaneOf<2>> read;
    if (!STEEP) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const float* const low = dL[j] + 2 * below;
                const float* const high = dL[4 + j] + 2 * below;
                *log_at(logs, 4 * !second + j, below, me) =
                    second ? make_float2(low[0], low[1]) : make_float2(high[0], high[1]);
                dl[j][2 * below] = second ? high[0] : low[0];
                dl[j][2 * below + 1] = second ? high[1] : low[1];
            }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const float2 given = *log_at(logs, 4 * second + j, below, me);
                const float2 mine = make_float2(dl[j][2 * below], dl[j][2 * below + 1]);
                const float2 reads = second ? given : mine, writes = second ? mine : given;
                read[j][2 * below] = reads.x, read[j][2 * below + 1] = reads.y;
                dl[j][2 * below] = reads.x - writes.x, dl[j][2 * below + 1] = reads.y - writes.y;
            }
        accumulate_back(dl, own);
        if (me.g == 0)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                *reinterpret_cast<float2*>(totals + me.strip * SIDE + 8 * (own.piece + j) + 2 * me.q) =
                    make_float2(dl[j][0], dl[j][1]);
        __syncthreads();
    }
    if (threadIdx.x < SIDE)
        to.du[unit * SIDE + threadIdx.x] = du_sums[threadIdx.x] + du_sums[SIDE + threadIdx.x] +
                                           du_sums[2 * SIDE + threadIdx.x] +
                                           du_sums[3 * SIDE + threadIdx.x];
    const float scale = facts[6], limit = facts[7];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int column = 8 * (own.piece + j) + 2 * me.q;
        float2 after = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = STEEP ? 8 : 1; i < 12; ++i)  // dl of later warps, ends of all
            if (i >= 4 || i > me.strip) {
                const float2 more = *reinterpret_cast<const float2*>(totals + i * SIDE + column);
                after.x += more.x, after.y += more.y;
            }
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int t = row + me.g + 8 * below, e = 2 * below;
            float2 slope = make_float2(0.0f, 0.0f);
            if (t < chunk.left) {
                const float2 raw = unpack_bf16(
                    *reinterpret_cast<const uint32_t*>(to.w + first + t * (stride / 2) + column));
                slope.x = log2_kept(raw.x, limit), slope.y = log2_kept(raw.y, limit);
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float l = n ? slope.y : slope.x;
                const float sum = dl[j][e + n] + (n ? after.y : after.x) - (STEEP ? 0.0f : read[j][e + n]);
                dl[j][e + n] = l > -MOST ? sum * l * scale : 0.0f;
            }
        }
    }
    store_rows<BF16>(to.dw + first, stride, k_end, dl, row, chunk.left, own);
}

extern "C" __global__ void __launch_bounds__(256, LARGE_BLOCKS)
    wkv6_gradient(const uint16_t* r, const uint16_t* w, const uint16_t* k, const uint16_t* v,
                  const uint16_t* u, const uint16_t* grad_y, const uint16_t* states,
                  const float* exponents, const uint16_t* grad_states, const float* grad_exponents,
                  uint16_t* dr, uint16_t* dw, uint16_t* dk, uint16_t* dv, float* du, const int* steep,
                  const int* owners, const int64_t* cu_seqlens, int T, int H) {
    DYNAMIC_TILES(memory);
    const Chunk chunk = find_chunk(blockIdx.x / H, owners, cu_seqlens, T);
    if (chunk.left <= 0 && threadIdx.x < SIDE)
        du[static_cast<int64_t>(blockIdx.x) * SIDE + threadIdx.x] = 0.0f;
    if (chunk.left <= 0 || steep[blockIdx.x]) return;
    make_gradients<false>(memory,
                          {r, w, k, v, u, grad_y, states, exponents, grad_states, grad_exponents, dr,
                           dw, dk, dv, du},
                          blockIdx.x, blockIdx.x % H, chunk, H);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    wkv6_gradient_steep(const uint16_t* r, const uint16_t* w, const uint16_t* k, const uint16_t* v,
                        const uint16_t* u, const uint16_t* grad_y, const uint16_t* states,
                        const float* exponents, const uint16_t* grad_states,
                        const float* grad_exponents, uint16_t* dr, uint16_t* dw, uint16_t* dk,
                        uint16_t* dv, float* du, const int* steep, const int* owners,
                        const int64_t* cu_seqlens, int slots, int T, int H) {
    DYNAMIC_TILES(memory);
    for_each_steep(steep, static_cast<int64_t>(slots) * H, threadIdx.x & 31, [&](int64_t unit) {
        make_gradients<true>(memory,
                             {r, w, k, v, u, grad_y, states, exponents, grad_states, grad_exponents,
                              dr, dw, dk, dv, du},
                             unit, unit % H, find_chunk(unit / H, owners, cu_seqlens, T), H);
    });
}
