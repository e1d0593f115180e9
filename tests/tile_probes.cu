#include "../cuda/tiles.cuh"

// Products of two tiles by a group of four warps, one of each kind.
template <class Type>
__device__ void multiply_tiles(const uint16_t* a, const uint16_t* b, float* out, unsigned char* memory) {
    const Lane me;
    const int row = 16 * me.strip;
    unsigned char *const left = memory, *const right = memory + TILE;
    fetch_rows(left, a, 2 * SIDE, row, SIDE, me);
    fetch_rows(right, b, 2 * SIDE, row, SIDE, me);
    cp_async_commit();
    cp_async_wait<0>();
    group_fence();
    __syncthreads();
    Operand rows;
    for (int k = 0; k < 4; ++k) left_rows(rows[k], left, row, k, me);
    Numbers x;
    const auto put = [&](int product) {
        for (int j = 0; j < 8; ++j)
            for (int e = 0; e < 4; ++e)
                out[((product * SIDE) + row + me.g + 8 * (e >> 1)) * SIDE + 8 * j + 2 * me.q + (e & 1)] =
                    x[j][e];
    };
    multiply_by_rows<Type>(x, left, right, me);
    put(0);
    multiply_by_rows<Type>(x, rows, right, me);
    put(1);
    multiply_by_columns<Type>(x, left, right, me);
    put(2);
    add_product<Type>(x, rows, right, me);
    put(3);
    multiply_columns<Type, false>(x, left, right, me);
    put(4);
    multiply_columns<Type, true>(x, left, right, me);
    put(5);
}

extern "C" __global__ void probe_tiles_f16(const uint16_t* a, const uint16_t* b, float* out) {
    DYNAMIC_TILES(memory);
    multiply_tiles<F16>(a, b, out, memory);
}

extern "C" __global__ void probe_tiles_bf16(const uint16_t* a, const uint16_t* b, float* out) {
    DYNAMIC_TILES(memory);
    multiply_tiles<BF16>(a, b, out, memory);
}
