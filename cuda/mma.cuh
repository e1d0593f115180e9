// What the kernels need beyond CUDA C++: tensor-core products, matrix loads from shared memory,
// copies to shared memory that run beside the computation, 16-bit floats as raw bits, and barriers
// of some of a block's warps. Compiles with nvcc and NVRTC for sm_80 and newer, and with
// RWKV_EMULATED as ordinary C++ on tests/cuda_emulator.h, which has the same functions.
//
// Fragments, for lane = 4 g + t of a warp; two 16-bit values in a register, the lower column (or
// row, for b) in the lower half:
//   a of m16n8k16   a[0] row g, columns 2t 2t+1; a[1] row g+8; a[2] row g, columns 2t+8 2t+9;
//                   a[3] row g+8, columns 2t+8 2t+9
//   b of m16n8k16   b[0] rows 2t 2t+1, column g; b[1] rows 2t+8 2t+9, column g
//   c               c[0] c[1] row g, columns 2t 2t+1; c[2] c[3] row g+8
//   a of m16n8k8    a[0] row g, column t; a[1] row g+8; a[2] row g, column t+4; a[3] row g+8
//   b of m16n8k8    b[0] row t, column g; b[1] row t+4
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and after.
#pragma once

#ifdef __CUDACC_RTC__
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

// Compiled for Hopper with all that it has (sm_90a).
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define GROUP_PRODUCTS
#endif

#ifdef RWKV_EMULATED

#define DYNAMIC_TILES(name) DYNAMIC_SHARED(name)

using emulator::bf16_to_float;
using emulator::cp_async_16;
using emulator::cp_async_commit;
using emulator::cp_async_wait;
using emulator::exp2_approx;
using emulator::f16_to_float;
using emulator::float_to_bf16;
using emulator::float_to_f16;
using emulator::float_to_tf32;
using emulator::ldmatrix_x2;
using emulator::ldmatrix_x2_trans;
using emulator::ldmatrix_x4;
using emulator::ldmatrix_x4_trans;
using emulator::mma_bf16;
using emulator::mma_f16;
using emulator::mma_tf32;
using emulator::named_barrier_arrive;
using emulator::named_barrier_sync;
using emulator::pack_bf16;
using emulator::pack_f16;
using emulator::unpack_bf16;
using emulator::unpack_f16;

#else

// The dynamic shared memory of a block, as bytes, declared inside a kernel.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// The same where a group's products read tiles.
#define DYNAMIC_TILES(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Two or four 8 x 8 matrices of 16-bit values; lanes 8 i to 8 i + 7 pass the addresses of the rows
// of matrix i, 16 aligned bytes each. r[i] holds row lane / 4, columns 2 (lane % 4) and the next,
// of matrix i; of its transpose with `_trans`. All lanes of x2 pass a valid address.
__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t r[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t r[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b, with a 16 x 16 and b 16 x 8 in fp16 or bf16 and c in float32.
__device__ __forceinline__ void mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b, with a 16 x 8 and b 8 x 8: float32 bits, of which the lowest 13 are not looked at.
__device__ __forceinline__ void mma_tf32(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Begin to copy 16 aligned bytes from global to shared memory; zeros, and no read, if not `valid`.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}

// Close this thread's group of copies; cp_async_wait<n> waits until at most the last n groups are
// still under way. Other threads see what arrived after a barrier.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int n>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// 16-bit floats as bits, rounded to nearest even; pairs hold the first argument in the lower half.
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ uint16_t float_to_f16(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ uint16_t float_to_bf16(float x) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Rounded to nearest, ties away from zero, to the 19 bits that mma_tf32 looks at. The other 13 are
// not promised to be zero: mask them before the result is taken for a float.
__device__ __forceinline__ uint32_t float_to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ float f16_to_float(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ float bf16_to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ float2 unpack_f16(uint32_t bits) {
    return make_float2(f16_to_float(static_cast<uint16_t>(bits & 0xffffu)),
                       f16_to_float(static_cast<uint16_t>(bits >> 16)));
}

__device__ __forceinline__ float2 unpack_bf16(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

// 2 to the x, off by two units in the last place at most; subnormal results are zero.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#ifdef GROUP_PRODUCTS
// Products by a group of four warps (Hopper alone): c = A B or c += A B for 64 x 64 numbers c, of
// which warp i of the group has rows 16 i to 16 i + 15 as m16n8k16 leaves them, c[j] columns 8 j to
// 8 j + 7. A and B are tiles of 64 rows of 128 bytes in shared memory whose pieces of 16 bytes lie in
// place p ^ (row & 7), aligned to 1,024 bytes; between their writing and the product came
// group_fence() and a barrier. Or A is in registers: each warp's 16 rows, a[k] columns 16 k to
// 16 k + 15.
//
// A descriptor holds the address and the step from eight rows to the next eight, in units of 16
// bytes, and the kind of interleaving. 16 columns further on are 32 bytes, 16 rows 2,048.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
__device__ __forceinline__ uint64_t describe_tile(const void* tile) {
    return static_cast<uint64_t>(shared_address(tile) >> 4) | (uint64_t{64} << 32) | (uint64_t{1} << 62);
}

#define EIGHT(kind, c, j) \
    kind(c[j][0]), kind(c[j][1]), kind(c[j][2]), kind(c[j][3]), kind(c[j + 1][0]), \
        kind(c[j + 1][1]), kind(c[j + 1][2]), kind(c[j + 1][3])
#define NUMBERS(kind, c) EIGHT(kind, c, 0), EIGHT(kind, c, 2), EIGHT(kind, c, 4), EIGHT(kind, c, 6)
#define STEP(type, a, b, add, turned) \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
    " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " a ", " b \
    ", " add ", 1, 1, " turned ";\n"
#define BEGIN "{\n.reg .b64 a, b;\nwgmma.fence.sync.aligned;\n"
#define END "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n}\n"
#define OF_TILES(name, type, kind, add, a_step, b_step, turned) \
    static __device__ __forceinline__ void name(float (&c)[8][4], const void* left, \
                                                const void* right) { \
        asm volatile(BEGIN STEP(type, "%32", "%33", add, turned) \
                     "add.s64 a, %32, " a_step ";\nadd.s64 b, %33, " b_step ";\n" \
                     STEP(type, "a", "b", "1", turned) \
                     "add.s64 a, a, " a_step ";\nadd.s64 b, b, " b_step ";\n" \
                     STEP(type, "a", "b", "1", turned) \
                     "add.s64 a, a, " a_step ";\nadd.s64 b, b, " b_step ";\n" \
                     STEP(type, "a", "b", "1", turned) END \
                     : NUMBERS(kind, c) \
                     : "l"(describe_tile(left)), "l"(describe_tile(right)) \
                     : "memory"); \
    }
#define FOUR(a, k) "r"(a[k][0]), "r"(a[k][1]), "r"(a[k][2]), "r"(a[k][3])
#define OF_REGISTERS(name, type, kind, add, b_step, turned) \
    static __device__ __forceinline__ void name(float (&c)[8][4], const uint32_t (&a)[4][4], \
                                                const void* right) { \
        asm volatile(BEGIN STEP(type, "{%32, %33, %34, %35}", "%48", add, turned) \
                     "add.s64 b, %48, " b_step ";\n" \
                     STEP(type, "{%36, %37, %38, %39}", "b", "1", turned) \
                     "add.s64 b, b, " b_step ";\n" \
                     STEP(type, "{%40, %41, %42, %43}", "b", "1", turned) \
                     "add.s64 b, b, " b_step ";\n" \
                     STEP(type, "{%44, %45, %46, %47}", "b", "1", turned) END \
                     : NUMBERS(kind, c) \
                     : FOUR(a, 0), FOUR(a, 1), FOUR(a, 2), FOUR(a, 3), "l"(describe_tile(right)) \
                     : "memory"); \
    }
// by_rows: B is the right tile's transpose; by_columns: the right tile; of_columns: so, and A is the
// left tile's transpose.
#define GROUP(name, type) \
    struct name { \
        OF_TILES(by_rows, type, "=f", "0", "2", "2", "0, 0") \
        OF_TILES(by_columns, type, "=f", "0", "2", "128", "0, 1") \
        OF_TILES(of_columns, type, "=f", "0", "128", "128", "1, 1") \
        OF_TILES(add_of_columns, type, "+f", "1", "128", "128", "1, 1") \
        OF_REGISTERS(by_rows, type, "=f", "0", "2", "0") \
        OF_REGISTERS(add_by_columns, type, "+f", "1", "128", "1") \
    };
GROUP(GroupF16, "f16")
GROUP(GroupBF16, "bf16")
#undef EIGHT
#undef NUMBERS
#undef STEP
#undef BEGIN
#undef END
#undef OF_TILES
#undef FOUR
#undef OF_REGISTERS
#undef GROUP

// What this thread wrote to shared memory is there for products by groups, after a barrier.
__device__ __forceinline__ void group_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif

// Barriers 1 to 15 of whole warps (0 is __syncthreads). `threads` counts all that take part, those
// that wait and those that only say they were here; each warp calls from one place.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#endif
