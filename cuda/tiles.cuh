// Tiles of 64 x 64 numbers of 16 bits in shared memory, products of them by warps that own 16 rows
// each, and numbers laid out over a warp's lanes as the products leave them ("in lanes").
//
// A tile's row has 128 bytes in 8 pieces of 16; piece p of row r lies in place p ^ (r & 7), so that
// eight rows of one column of pieces lie in different banks.
//
// In lanes: x[j][e] of lane 4 g + q is row g (e < 2) or g + 8 (e >= 2), column 8 j + 2 q + e % 2 of
// the warp's 16 rows. Packed in pairs, x[2 k] and x[2 k + 1] are the left operand a[k] of a product
// that sums over columns 16 k to 16 k + 15.
#pragma once

#include "mma.cuh"

constexpr int SIDE = 64;               // tokens of a chunk, and channels of a head
constexpr int TILE = SIDE * SIDE * 2;  // bytes
constexpr uint32_t ALL = 0xffffffffu;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOG2_LOG2_E = 0.5287663729448977f;

using Operand = uint32_t[4][4];  // 16 rows of a tile as a left operand

__device__ __forceinline__ int place(int row, int piece) {
    return row * 128 + ((piece ^ (row & 7)) << 4);
}

// A thread's place in its block, and in what a warp's matrix loads and pair accesses touch: with a
// row that is a multiple of 16 added and an even piece exclusively or'ed, every address follows from
// one of these, which costs fewer registers than the addresses themselves.
//
// Four warps, a group, have the 64 rows of a tile. HALVES groups share a tile: 1, or 2 with 32 columns
// each; a warp's numbers in lanes are then those of its own columns.
template <int HALVES>
struct LaneOf {
    static constexpr int J = 8 / HALVES;  // groups of 8 columns
    int warp, lane, g, q;
    int strip;        // which 16 rows
    int piece;        // the first of the warp's own columns
    int pairs;        // of row g, piece 0, pair q
    int own_pairs;    // of row g, piece `piece`, pair q
    int matrices;     // of matrix lane / 8, the matrices two by two, pieces first
    int columns;      // of the same, rows first
    int own_columns;  // the same from piece `piece` on
    __device__ __forceinline__ LaneOf()
        : warp(threadIdx.x >> 5),
          lane(threadIdx.x & 31),
          g(lane >> 2),
          q(lane & 3),
          strip(warp & 3),
          piece(HALVES == 1 ? 0 : 4 * (warp >> 2)),
          pairs(place(g, 0) + q * 4),
          own_pairs(pairs ^ (piece << 4)),
          matrices(place((lane >> 4) * 8 + (lane & 7), (lane >> 3) & 1)),
          columns(place(((lane >> 3) & 1) * 8 + (lane & 7), lane >> 4)),
          own_columns(columns ^ (piece << 4)) {}
};

using Lane = LaneOf<1>;
template <class Me>
using NumbersOf = float[Me::J][4];
using Numbers = NumbersOf<Lane>;  // 16 rows of a tile, in lanes

struct F16 {
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        return pack_f16(low, high);
    }
    static __device__ __forceinline__ float2 unpack(uint32_t bits) { return unpack_f16(bits); }
    static __device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
        mma_f16(c, a, b);
    }
#ifdef GROUP_PRODUCTS
    using Group = GroupF16;
#endif
};

struct BF16 {
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        return pack_bf16(low, high);
    }
    static __device__ __forceinline__ float2 unpack(uint32_t bits) { return unpack_bf16(bits); }
    static __device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
        mma_bf16(c, a, b);
    }
#ifdef GROUP_PRODUCTS
    using Group = GroupBF16;
#endif
};

template <int J>
__device__ __forceinline__ void clear(float (&x)[J][4]) {
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[j][e] = 0.0f;
}

template <class Type>
__device__ __forceinline__ void pack(Operand& a, const Numbers& x) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        a[k][0] = Type::pack(x[2 * k][0], x[2 * k][1]);
        a[k][1] = Type::pack(x[2 * k][2], x[2 * k][3]);
        a[k][2] = Type::pack(x[2 * k + 1][0], x[2 * k + 1][1]);
        a[k][3] = Type::pack(x[2 * k + 1][2], x[2 * k + 1][3]);
    }
}

// ---- between lanes and a tile; `row` is the first of the warp's 16 rows ----

// The lane's pair of row (row + g), row a multiple of 8, own columns 8 j + 2 q.
template <class Me>
__device__ __forceinline__ uint32_t* pair_at(unsigned char* tile, int row, int j, const Me& me) {
    return reinterpret_cast<uint32_t*>(tile + row * 128 + (me.own_pairs ^ (j << 4)));
}

template <class Type, class Me>
__device__ __forceinline__ void read_rows(NumbersOf<Me>& x, unsigned char* tile, int row,
                                          const Me& me) {
#pragma unroll
    for (int j = 0; j < Me::J; ++j) {
        const float2 upper = Type::unpack(*pair_at(tile, row, j, me));
        const float2 lower = Type::unpack(*pair_at(tile, row + 8, j, me));
        x[j][0] = upper.x, x[j][1] = upper.y, x[j][2] = lower.x, x[j][3] = lower.y;
    }
}

template <class Type, class Me>
__device__ __forceinline__ void write_rows(unsigned char* tile, const NumbersOf<Me>& x, int row,
                                           const Me& me) {
#pragma unroll
    for (int j = 0; j < Me::J; ++j) {
        *pair_at(tile, row, j, me) = Type::pack(x[j][0], x[j][1]);
        *pair_at(tile, row + 8, j, me) = Type::pack(x[j][2], x[j][3]);
    }
}

// What `pack` made, to a tile.
__device__ __forceinline__ void write_operand(unsigned char* tile, const Operand& a, int row,
                                              const Lane& me) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below)
            *pair_at(tile, row + 8 * below, j, me) = a[j >> 1][(j & 1) * 2 + below];
}

// Columns 16 k to 16 k + 15 of tile rows row to row + 15 as a left operand.
template <class Me>
__device__ __forceinline__ void left_rows(uint32_t a[4], unsigned char* tile, int row, int k,
                                          const Me& me) {
    ldmatrix_x4(a, tile + row * 128 + (me.columns ^ (k << 5)));
}

// ---- between a tile and global memory, 16 bytes a lane; `stride` between rows in bytes ----

template <class Me>
__device__ __forceinline__ void fetch_rows(unsigned char* tile, const void* from, int64_t stride,
                                           int row, int rows, const Me& me) {
#pragma unroll
    for (int i = 0; i < Me::J / 2; ++i) {
        const int r = row + (i * 32 + me.lane) / Me::J, piece = me.piece + me.lane % Me::J;
        const auto* source = static_cast<const unsigned char*>(from) + r * stride + piece * 16;
        cp_async_16(tile + place(r, piece), r < rows ? source : from, r < rows);
    }
}

template <class Me>
__device__ __forceinline__ void put_rows(void* to, int64_t stride, unsigned char* tile, int row,
                                         int rows, const Me& me) {
#pragma unroll
    for (int i = 0; i < Me::J / 2; ++i) {
        const int r = row + (i * 32 + me.lane) / Me::J, piece = me.piece + me.lane % Me::J;
        if (r < rows)
            *reinterpret_cast<uint4*>(static_cast<unsigned char*>(to) + r * stride + piece * 16) =
                *reinterpret_cast<const uint4*>(tile + place(r, piece));
    }
}

// Numbers in lanes to the warp's rows and columns in global memory, by way of the same place of a
// tile that no other warp reads.
template <class Type, class Me>
__device__ __forceinline__ void store_rows(void* to, int64_t stride, unsigned char* tile,
                                           const NumbersOf<Me>& x, int row, int rows, const Me& me) {
    __syncwarp();
    write_rows<Type>(tile, x, row, me);
    __syncwarp();
    put_rows(to, stride, tile, row, rows, me);
}

// The same by way of 64 * ROWS bytes of the warp's own, 32 columns of 8 or 16 rows at a time.
template <class Type, int ROWS = 16>
__device__ __forceinline__ void store_by_halves(void* to, int64_t stride, unsigned char* stage,
                                                const Numbers& x, int row, int rows,
                                                const Lane& me) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int top = 0; top < 16; top += ROWS) {
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int r = 0; r < ROWS; r += 8) {
                    const float* const pair = x[4 * half + j] + (top + r) / 4;
                    *reinterpret_cast<uint32_t*>(stage + (me.g + r) * 64 +
                                                 ((j ^ (me.g >> 1 & 3)) << 4) + me.q * 4) =
                        Type::pack(pair[0], pair[1]);
                }
            __syncwarp();
#pragma unroll
            for (int r = 0; r < ROWS; r += 8) {
                const int t = row + top + me.g + r;
                if (t < rows)
                    *reinterpret_cast<uint4*>(static_cast<unsigned char*>(to) + t * stride +
                                              half * 64 + me.q * 16) =
                        *reinterpret_cast<const uint4*>(stage + (me.g + r) * 64 +
                                                        ((me.q ^ (me.g >> 1 & 3)) << 4));
            }
        }
}

// ---- right operands ----

// Tile rows row to row + 15, columns 16 k to 16 k + 15: b[0..1] for the product's columns
// row .. row + 7, b[2..3] for the next 8. The product sums over the tile's columns.
template <class Me>
__device__ __forceinline__ void right_rows(uint32_t b[4], unsigned char* tile, int row, int k,
                                           const Me& me) {
    ldmatrix_x4(b, tile + row * 128 + (me.matrices ^ (k << 5)));
}

// Tile rows row to row + 15, own columns 16 p to 16 p + 15: b[0..1] for the first 8 columns of the
// product, b[2..3] for the next 8. The product sums over the tile's rows.
template <class Me>
__device__ __forceinline__ void right_columns(uint32_t b[4], unsigned char* tile, int row, int p,
                                              const Me& me) {
    ldmatrix_x4_trans(b, tile + row * 128 + (me.own_columns ^ (p << 5)));
}

// Columns column to column + 15 of tile rows row .. row + 15, transposed: a left operand.
template <class Me>
__device__ __forceinline__ void left_columns(uint32_t a[4], unsigned char* tile, int row,
                                             int column, const Me& me) {
    ldmatrix_x4_trans(a, tile + row * 128 + (me.matrices ^ (column << 1)));
}

// ---- products of whole tiles ----

// c += a tile^T
template <class Type, class Me>
__device__ __forceinline__ void add_by_rows(NumbersOf<Me>& c, const Operand& a, unsigned char* tile,
                                            const Me& me) {
#pragma unroll
    for (int p = 0; p < Me::J / 2; ++p)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t b[4];
            right_rows(b, tile, 8 * me.piece + 16 * p, k, me);
            Type::mma(c[2 * p], a[k], b);
            Type::mma(c[2 * p + 1], a[k], b + 2);
        }
}

// c += a[k] (rows row .. row + 15 of the tile): one step of a product that sums over rows.
template <class Type, class Me>
__device__ __forceinline__ void add_step(NumbersOf<Me>& c, const uint32_t a[4], unsigned char* tile,
                                         int row, const Me& me) {
#pragma unroll
    for (int p = 0; p < Me::J / 2; ++p) {
        uint32_t b[4];
        right_columns(b, tile, row, p, me);
        Type::mma(c[2 * p], a, b);
        Type::mma(c[2 * p + 1], a, b + 2);
    }
}

// c += a tile
template <class Type, class Me>
__device__ __forceinline__ void add_by_columns(NumbersOf<Me>& c, const Operand& a,
                                               unsigned char* tile, const Me& me) {
#pragma unroll
    for (int k = 0; k < 4; ++k) add_step<Type>(c, a[k], tile, 16 * k, me);
}

// ---- products by the four warps of a group, all of which take part ----
//
// What they read was written before group_fence() and a barrier. Little code: what a warp runs once
// for each chunk is bound by the fetching of instructions where it is longer than their caches.

#ifndef GROUP_PRODUCTS
__device__ __forceinline__ void group_fence() {}
#endif

// c = left tile^T
template <class Type>
__device__ __forceinline__ void multiply_by_rows(Numbers& c, unsigned char* left,
                                                 unsigned char* tile, const Lane& me) {
#ifdef GROUP_PRODUCTS
    Type::Group::by_rows(c, left, tile);
#else
    clear(c);
#pragma unroll 1
    for (int k = 0; k < 4; ++k) {
        uint32_t a[4];
        left_rows(a, left, 16 * me.strip, k, me);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            uint32_t b[4];
            right_rows(b, tile, 16 * p, k, me);
            Type::mma(c[2 * p], a, b);
            Type::mma(c[2 * p + 1], a, b + 2);
        }
    }
#endif
}

// The same with each warp's rows of the left tile in registers.
template <class Type>
__device__ __forceinline__ void multiply_by_rows(Numbers& c, const Operand& left,
                                                 unsigned char* tile, const Lane& me) {
#ifdef GROUP_PRODUCTS
    Type::Group::by_rows(c, left, tile);
#else
    clear(c);
    add_by_rows<Type>(c, left, tile, me);
#endif
}

// c = left tile
template <class Type>
__device__ __forceinline__ void multiply_by_columns(Numbers& c, unsigned char* left,
                                                    unsigned char* tile, const Lane& me) {
#ifdef GROUP_PRODUCTS
    Type::Group::by_columns(c, left, tile);
#else
    clear(c);
#pragma unroll 1
    for (int k = 0; k < 4; ++k) {
        uint32_t a[4];
        left_rows(a, left, 16 * me.strip, k, me);
        add_step<Type>(c, a, tile, 16 * k, me);
    }
#endif
}

// c += left tile, with each warp's rows of the left tile in registers
template <class Type>
__device__ __forceinline__ void add_product(Numbers& c, const Operand& left, unsigned char* tile,
                                            const Lane& me) {
#ifdef GROUP_PRODUCTS
    Type::Group::add_by_columns(c, left, tile);
#else
    add_by_columns<Type>(c, left, tile, me);
#endif
}

// c = left^T tile or, with ADD, c += left^T tile
template <class Type, bool ADD>
__device__ __forceinline__ void multiply_columns(Numbers& c, unsigned char* left,
                                                 unsigned char* tile, const Lane& me) {
#ifdef GROUP_PRODUCTS
    if constexpr (ADD)
        Type::Group::add_of_columns(c, left, tile);
    else
        Type::Group::of_columns(c, left, tile);
#else
    if (!ADD) clear(c);
#pragma unroll 1
    for (int k = 0; k < 4; ++k) {
        uint32_t a[4];
        left_columns(a, left, 16 * k, 16 * me.strip, me);
        add_step<Type>(c, a, tile, 16 * k, me);
    }
#endif
}

// Of the warp's rows t, times `scale`, as a left operand: columns s up to t or, if `upper`, from t
// on; without `equal` not s = t.
template <class Type>
__device__ __forceinline__ void pack_triangle(Operand& a, const Numbers& c, bool upper, bool equal,
                                              float scale, const Lane& me) {
    // Of a block of 8 x 8 on the diagonal, which of a pair's halves belong to the triangle
    const int first = upper ? 2 * me.q - me.g : me.g - 2 * me.q, second = upper ? first + 1 : first - 1;
    const int least = equal ? 0 : 1;
    const uint32_t diagonal = (first >= least ? 0xffffu : 0u) | (second >= least ? 0xffff0000u : 0u);
    // Bit i: blocks by columns / 8 - rows % 16 / 8, and 1, that belong to it whole
    const int at = 2 * me.strip + 1;
    const uint32_t whole = upper ? ~1u << at : (1u << at) - 1;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int i = j - below + 1;
            const uint32_t mask = i == at ? diagonal : whole >> i & 1 ? ALL : 0u;
            a[j >> 1][(j & 1) * 2 + below] =
                Type::pack(c[j][2 * below] * scale, c[j][2 * below + 1] * scale) & mask;
        }
}

// The same of left tile^T; `left` as multiply_by_rows takes it.
template <class In, class Out, class Left>
__device__ __forceinline__ void multiply_to_triangle(Operand& out, Left& left, unsigned char* tile,
                                                     bool upper, bool equal, float scale,
                                                     const Lane& me) {
    Numbers c;
    multiply_by_rows<In>(c, left, tile, me);
    pack_triangle<Out>(out, c, upper, equal, scale, me);
}

// ---- powers of two ----

// log2 of the power of two at or below |x|, from -60 to 100: as power_below of
// rwkv/ops/triton_chunks.py.
__device__ __forceinline__ float exponent_below(float x) {
    const int exponent = static_cast<int>((__float_as_uint(x) >> 23) & 0xff) - 127;
    return static_cast<float>(min(max(exponent, -60), 100));
}

// 2 to a whole number; 0 below -126, at most 2^127.
__device__ __forceinline__ float power_of(float exponent) {
    const int biased = min(static_cast<int>(exponent) + 127, 254);
    return biased <= 0 ? 0.0f : __uint_as_float(static_cast<uint32_t>(biased) << 23);
}

template <int J>
__device__ __forceinline__ float largest(const float (&x)[J][4]) {
    float most = 0.0f;
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) most = fmaxf(most, fabsf(x[j][e]));
    return most;
}

__device__ __forceinline__ float largest_of_warp(float x) {
#pragma unroll
    for (int bits = 16; bits; bits >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL, x, bits));
    return x;
}

// Of the lanes that hold one row.
__device__ __forceinline__ float largest_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}
