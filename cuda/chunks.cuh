// What the wkv kernels share beside tiles: which tokens a chunk holds, tiles of 16 columns, and sums
// of decays over tokens.
#pragma once

#include "tiles.cuh"

// Blocks of up to 99 KiB of shared memory, all that one may have on compute capability 8.6, 8.9 and
// 12.x, that share a multiprocessor: one there and on 8.0, two on 9.0 to 11.x, which have 228 KiB.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define LARGE_BLOCKS 2
#else
#define LARGE_BLOCKS 1
#endif

// ---- which tokens a chunk holds: as in rwkv/ops/triton_chunks.py ----

struct Chunk {
    int64_t first;  // token, over all rows
    int left;       // tokens from here to the end of the sequence; not positive for an empty slot
};

__device__ __forceinline__ Chunk find_chunk(int slot, const int* owners, const int64_t* cu_seqlens,
                                            int T) {
    if (cu_seqlens == nullptr) {
        const int chunks = (T + SIDE - 1) / SIDE, row = slot / chunks, chunk = slot % chunks;
        return {static_cast<int64_t>(row) * T + chunk * SIDE, T - chunk * SIDE};
    }
    const int q = owners[slot];
    const int64_t begin = cu_seqlens[q], end = cu_seqlens[q + 1];
    const int64_t first = begin + (slot - (begin / SIDE + q)) * SIDE;
    return {first, static_cast<int>(end - first)};
}

struct Sequence {
    int64_t begin, slot;
    int length;
};

__device__ __forceinline__ Sequence find_sequence(int q, const int64_t* cu_seqlens, int T) {
    if (cu_seqlens == nullptr) {
        const int64_t chunks = (T + SIDE - 1) / SIDE;
        return {static_cast<int64_t>(q) * T, q * chunks, T};
    }
    const int64_t begin = cu_seqlens[q];
    return {begin, begin / SIDE + q, static_cast<int>(cu_seqlens[q + 1] - begin)};
}

// ---- tiles of 16 columns: rows of 32 bytes, the halves of rows 4 to 7 and 12 to 15 swapped ----

__device__ __forceinline__ int place_in_narrow(int row, int half) {
    return row * 32 + ((half ^ ((row >> 2) & 1)) << 4);
}

__device__ __forceinline__ void right_block(uint32_t b[4], unsigned char* block, const Lane& me) {
    const int i = me.lane >> 3;
    ldmatrix_x4_trans(b, block + place_in_narrow((i & 1) * 8 + (me.lane & 7), i >> 1));
}

// ---- sums of decays ----

// Sums over the warp's rows up to each.
template <class Me>
__device__ __forceinline__ void accumulate(NumbersOf<Me>& x, const Me& me) {
#pragma unroll
    for (int j = 0; j < Me::J; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
            for (int d = 4; d < 32; d *= 2) {
                const float before = __shfl_up_sync(ALL, x[j][e], d);
                if (me.lane >= d) x[j][e] += before;
            }
#pragma unroll
        for (int e = 0; e < 2; ++e) x[j][e + 2] += __shfl_sync(ALL, x[j][e], 28 + me.q);
    }
}

// Sums over the warp's rows from each on.
template <class Me>
__device__ __forceinline__ void accumulate_back(NumbersOf<Me>& x, const Me& me) {
#pragma unroll
    for (int j = 0; j < Me::J; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
            for (int d = 4; d < 32; d *= 2) {
                const float after = __shfl_down_sync(ALL, x[j][e], d);
                if (me.lane + d < 32) x[j][e] += after;
            }
#pragma unroll
        for (int e = 0; e < 2; ++e) x[j][e] += __shfl_sync(ALL, x[j][e + 2], me.q);
    }
}

// For own columns 8 j + 2 q and the next: the sums of l over the rows of earlier warps, over the first
// half of the chunk and over the second.
struct Halves {
    float before[2], middle[2], rest[2];
    template <class Me>
    __device__ __forceinline__ Halves(const float* sums, int j, const Me& me) {
        float2 s[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            s[i] = *reinterpret_cast<const float2*>(sums + i * SIDE + 8 * (me.piece + j) + 2 * me.q);
        middle[0] = s[0].x + s[1].x, middle[1] = s[0].y + s[1].y;
        rest[0] = s[2].x + s[3].x, rest[1] = s[2].y + s[3].y;
        before[0] = before[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < 3; ++i)
            if (i < me.strip) before[0] += s[i].x, before[1] += s[i].y;
    }
};

// Where the lane keeps what belongs to its pair of row g + 8 below, columns 8 j + 2 q.
template <class Pair>
__device__ __forceinline__ Pair* log_at(Pair* logs, int j, int below, const Lane& me) {
    return logs + (me.strip * 16 + 2 * j + below) * 32 + me.lane;
}
