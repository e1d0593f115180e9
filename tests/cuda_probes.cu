// Small kernels that try each function of cuda/mma.cuh and each thing that the emulator finds.
#include "../cuda/mma.cuh"

// The pair of 16-bit values in rows r and r + rows / 2 of column c, as a fragment holds them.
__device__ uint32_t pair(const uint16_t* low, const uint16_t* high) {
    return *low | static_cast<uint32_t>(*high) << 16;
}

template <class Multiply>
__device__ void multiply_16(const uint16_t* a, const uint16_t* b, float* c, Multiply multiply) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t fa[4], fb[2];
    float fc[4];
    for (int i = 0; i < 4; ++i) {
        const uint16_t* from = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
        fa[i] = pair(from, from + 1);
        fc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    }
    for (int i = 0; i < 2; ++i) {
        const uint16_t* from = b + (2 * t + i * 8) * 8 + g;
        fb[i] = pair(from, from + 8);
    }
    multiply(fc, fa, fb);
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

struct MultiplyF16 {
    __device__ void operator()(float* c, const uint32_t* a, const uint32_t* b) { mma_f16(c, a, b); }
};
struct MultiplyBf16 {
    __device__ void operator()(float* c, const uint32_t* a, const uint32_t* b) { mma_bf16(c, a, b); }
};

extern "C" __global__ void probe_mma_f16(const uint16_t* a, const uint16_t* b, float* c) {
    multiply_16(a, b, c, MultiplyF16{});
}

extern "C" __global__ void probe_mma_bf16(const uint16_t* a, const uint16_t* b, float* c) {
    multiply_16(a, b, c, MultiplyBf16{});
}

extern "C" __global__ void probe_mma_tf32(const float* a, const float* b, float* c) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t fa[4], fb[2];
    float fc[4];
    for (int i = 0; i < 4; ++i) {
        fa[i] = __float_as_uint(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
        fc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    }
    for (int i = 0; i < 2; ++i) fb[i] = __float_as_uint(b[(t + i * 4) * 8 + g]);
    mma_tf32(fc, fa, fb);
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

#define PROBE_LDMATRIX(load, count)                                                              \
    extern "C" __global__ void probe_##load(const uint4* matrices, uint32_t* out) {             \
        __shared__ uint4 rows[8 * count];                                                        \
        const int lane = threadIdx.x;                                                            \
        if (lane < 8 * count) rows[lane] = matrices[lane];                                       \
        __syncwarp();                                                                            \
        uint32_t r[count];                                                                       \
        load(r, &rows[lane % (8 * count)]);                                                      \
        for (int i = 0; i < count; ++i) out[i * 32 + lane] = r[i];                               \
    }

PROBE_LDMATRIX(ldmatrix_x4, 4)
PROBE_LDMATRIX(ldmatrix_x4_trans, 4)
PROBE_LDMATRIX(ldmatrix_x2, 2)
PROBE_LDMATRIX(ldmatrix_x2_trans, 2)

extern "C" __global__ void probe_conflicts(const uint16_t* from, int stride) {
    DYNAMIC_SHARED(memory);
    uint16_t* rows = reinterpret_cast<uint16_t*>(memory);
    for (int i = threadIdx.x; i < 32 * stride; i += 32) rows[i] = from[i];
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, rows + threadIdx.x * stride);
}

#define PROBE_NUMBERS(type)                                                                      \
    extern "C" __global__ void probe_##type(const float* x, uint16_t* bits, float* back,         \
                                            uint32_t* pairs, float2* unpacked, int n) {          \
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) { \
            bits[i] = float_to_##type(x[i]);                                                     \
            back[i] = type##_to_float(bits[i]);                                                  \
            pairs[i] = pack_##type(x[i], -x[i]);                                                 \
            unpacked[i] = unpack_##type(pairs[i]);                                               \
        }                                                                                        \
    }

PROBE_NUMBERS(f16)
PROBE_NUMBERS(bf16)

extern "C" __global__ void probe_sum(const float* x, float* sums, int n) {
    DYNAMIC_SHARED(memory);
    float* parts = reinterpret_cast<float*>(memory);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
    for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float whole = 0.0f;
        for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) whole += parts[i];
        sums[blockIdx.x] = whole;
    }
}

extern "C" __global__ void probe_shuffles(int* out) {
    const int lane = threadIdx.x;
    out[lane] = __shfl_sync(0xffffffffu, lane, 5);
    out[32 + lane] = __shfl_xor_sync(0xffffffffu, lane, 3);
    out[64 + lane] = __shfl_down_sync(0xffffffffu, lane, 4);
    out[96 + lane] = __shfl_up_sync(0xffffffffu, lane, 4);
    out[128 + lane] = __shfl_sync(0xffffffffu, lane, 2, 8);
    out[160 + lane] = lane;
    if (lane < 16) out[160 + lane] = __shfl_xor_sync(0x0000ffffu, lane, 1);
}

// Warps 0 and 1 fill one buffer row by row, warps 2 and 3 empty it: barrier 1 full, 2 empty.
extern "C" __global__ void probe_pipeline(const float* x, float* y, int rows) {
    DYNAMIC_SHARED(memory);
    float* buffer = reinterpret_cast<float*>(memory);
    const int i = threadIdx.x % 64;
    if (threadIdx.x < 64) {
        for (int row = 0; row < rows; ++row) {
            named_barrier_sync(2, 128);
            buffer[i] = 2.0f * x[row * 64 + i];
            named_barrier_arrive(1, 128);
        }
    } else {
        named_barrier_arrive(2, 128);
        for (int row = 0; row < rows; ++row) {
            named_barrier_sync(1, 128);
            y[row * 64 + i] = buffer[i];
            if (row + 1 < rows) named_barrier_arrive(2, 128);
        }
    }
}

extern "C" __global__ void probe_copy(const float* x, float* y, int n, int waits) {
    DYNAMIC_SHARED(memory);
    float* buffer = reinterpret_cast<float*>(memory);
    const int i = threadIdx.x * 4;
    cp_async_16(buffer + i, x + (i < n ? i : 0), i < n);
    cp_async_commit();
    if (waits) cp_async_wait<0>();
    for (int j = 0; j < 4; ++j) y[i + j] = buffer[i + j];
}

// Rows of 128 floats through a ring of three, two of them under way while one is read.
extern "C" __global__ void probe_groups(const float* x, float* y, int rows) {
    DYNAMIC_SHARED(memory);
    float* ring = reinterpret_cast<float*>(memory);
    const int i = threadIdx.x * 4;
    for (int row = 0; row < rows + 2; ++row) {
        if (row < rows) cp_async_16(ring + row % 3 * 128 + i, x + row * 128 + i);
        cp_async_commit();
        if (row < 2) continue;
        cp_async_wait<2>();
        __syncwarp();
        for (int j = 0; j < 4; ++j) y[(row - 2) * 128 + 127 - i - j] = ring[(row - 2) % 3 * 128 + 127 - i - j];
        __syncwarp();
    }
}

extern "C" __global__ void probe_floats(const float* x, float* exponential, uint32_t* tf32, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        exponential[i] = exp2_approx(x[i]);
        tf32[i] = float_to_tf32(x[i]);
    }
}

// Each argument's slot is read as what it is.
extern "C" __global__ void probe_arguments(int a, long long b, float c, double* out, int d, const void* none) {
    if (threadIdx.x) return;
    out[0] = a;
    out[1] = static_cast<double>(b);
    out[2] = c;
    out[3] = d;
    out[4] = none ? 1.0 : 0.0;
}

extern "C" __global__ void probe_add(const float* x, float* y, float step, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + step;
}

extern "C" __global__ void probe_indices(int* out) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int i = block * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + thread;
    out[i] = i;
}

extern "C" __global__ void probe_uninitialised(float* out) {
    DYNAMIC_SHARED(memory);
    __shared__ float fixed[32];
    float* dynamic = reinterpret_cast<float*>(memory);
    const int i = threadIdx.x;
    out[blockIdx.x * 64 + i] = dynamic[i];
    out[blockIdx.x * 64 + 32 + i] = fixed[i];
    dynamic[i] = 1.0f;
    fixed[i] = 1.0f;
}

extern "C" __global__ void probe_wrong(int what, float* x, int bytes) {
    DYNAMIC_SHARED(memory);
    __shared__ __align__(16) float fixed[64];
    const int i = threadIdx.x;
    uint32_t r[4] = {0, 0, 0, 0};
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    switch (what) {
        case 0:  // one warp leaves before the barrier
            if (i < 32) __syncthreads();
            break;
        case 1:  // half a warp at another barrier of the same block
            if (i < 16)
                __syncthreads();
            else
                __syncthreads();
            break;
        case 2:
            if (i % 32 < 16) __syncwarp();
            mma_f16(c, r, r);
            break;
        case 3:
            if (i == 0) memory[bytes] = 1;
            break;
        case 4:
            x[i + 1] = 1.0f;
            break;
        case 5:  // no barrier between write and read
            fixed[i] = static_cast<float>(i);
            x[i] = fixed[63 - i] >= 0.0f ? 1.0f : 0.0f;
            break;
        case 6:
            ldmatrix_x4(r, memory + 16 * i + 8);
            break;
        case 7:
            ldmatrix_x4(r, x);
            break;
        case 8:
            named_barrier_sync(1, 48);
            break;
        case 9:
            named_barrier_sync(1, i < 32 ? 64 : 32);
            break;
        case 10:  // a vector at an odd place
            *reinterpret_cast<float2*>(x + 1 + i / 32) = make_float2(0.0f, 1.0f);
            break;
        case 11:
            if (i < 16) x[i] = __shfl_sync(0x0000ffffu, x[i], 20);
            break;
        case 12:  // all write one place
            x[0] = static_cast<float>(i);
            break;
    }
}
