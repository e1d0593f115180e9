// CUDA C++ on a CPU, to test kernels where there is no GPU: included before a source of cuda/, it
// makes that source ordinary C++ (tests/emulate.py compiles, loads and launches it).
//
// Every thread of a block is a fiber; one runs at a time, until it has to wait at a barrier or for
// the other lanes of its warp. Blocks run one after the other. Fibers take turns in ascending or
// in descending order: a result that depends on it betrays a missing barrier. What else is found:
//   - a barrier or a warp-wide function that not all reach, or reach at different places
//   - shared memory read before it is written: it is filled with 0xff (a NaN) before each block
//   - copies to shared memory read before they were waited for: they arrive as late as they may
//   - accesses beyond the dynamic shared memory or a tensor: they lie between inaccessible pages
//   - misaligned vectors and local array indices out of bounds, by g++'s checks
#pragma once
#define RWKV_EMULATED 1

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
const int warpSize = 32;

extern char __start_rwkv_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_rwkv_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

const size_t GUARD = size_t(16) << 20;
const size_t STACK = size_t(256) << 10;
const size_t PAGE = 4096;

struct Copy { void* to; const void* from; bool valid; };

struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool started, done;
    uint3 index;
    unsigned thread;
    const unsigned* waits;  // until *waits differs from `seen`; null if it can run
    unsigned seen;
    const char* what;
    int line;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

// Lanes of one warp that wait for each other; the last to come does the work of all.
struct Meeting { uint32_t mask, arrived; unsigned generation; const char* what; int line; void* lanes[32]; };

struct Barrier {
    unsigned expected, arrived, generation;
    uint32_t lanes[32];  // of each warp
    int lines[32];
};

struct Region { char *begin, *low, *high, *end; std::string name; };

std::vector<Fiber> fibers;
std::vector<std::deque<Meeting>> warps;
Barrier barriers[16];
std::vector<Region> regions;
Fiber* current;
jmp_buf scheduler;
sigjmp_buf failed;
char message[1024];
char* shared_low;
size_t shared_bytes;
void (*entry)(void**);
void** arguments;
unsigned long long conflicts;

[[noreturn]] void fail(const char* format, ...) {
    int length = 0;
    if (current)
        length = snprintf(message, sizeof message, "block (%u, %u, %u) thread (%u, %u, %u): ", blockIdx.x,
                          blockIdx.y, blockIdx.z, current->index.x, current->index.y, current->index.z);
    va_list rest;
    va_start(rest, format);
    vsnprintf(message + length, sizeof message - length, format, rest);
    va_end(rest);
    siglongjmp(failed, 1);
}

__attribute__((noinline)) void suspend() {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

void run_fiber() {
    for (;;) {
        entry(arguments);
        current->done = true;
        suspend();
    }
}

void wait(const unsigned* generation, const char* what, int line) {
    current->waits = generation;
    current->seen = *generation;
    current->what = what;
    current->line = line;
    suspend();
}

template <class Request, class Work>
void meet(const char* what, uint32_t mask, bool aligned, int line, Request& mine, Work work) {
    const unsigned lane = current->thread % 32;
    current->line = line;
    if (!(mask >> lane & 1)) fail("%s (line %d): the mask 0x%08x lacks the calling lane", what, line, mask);
    auto& meetings = warps[current->thread / 32];
    Meeting* meeting = nullptr;
    for (Meeting& m : meetings)
        if (m.mask == mask) meeting = &m;
    if (!meeting) {
        meetings.push_back(Meeting{mask, 0, 0, what, line, {}});
        meeting = &meetings.back();
    }
    if (!meeting->arrived) {
        meeting->what = what;
        meeting->line = line;
    } else if (strcmp(meeting->what, what) || (aligned && meeting->line != line)) {
        fail("the warp diverges: this lane is at %s (line %d), others are at %s (line %d)", what, line,
             meeting->what, meeting->line);
    }
    meeting->lanes[lane] = &mine;
    meeting->arrived |= 1u << lane;
    if (meeting->arrived != mask) return wait(&meeting->generation, what, line);
    meeting->arrived = 0;
    ++meeting->generation;
    work(reinterpret_cast<Request**>(meeting->lanes));
}

const uint32_t ALL = 0xffffffffu;

void arrive(const char* what, int id, unsigned threads, int line, bool waits) {
    if (id < 0 || id > 15) fail("%s (line %d): barrier %d, there are 0 to 15", what, line, id);
    if (threads == 0 || threads % 32 || threads > fibers.size())
        fail("%s (line %d): barrier %d of %u threads, in a block of %zu; name whole warps", what, line, id,
             threads, fibers.size());
    Barrier& barrier = barriers[id];
    const unsigned warp = current->thread / 32, lane = current->thread % 32;
    current->line = line;
    if (!barrier.arrived) barrier.expected = threads;
    if (barrier.expected != threads)
        fail("%s (line %d): barrier %d of %u threads, others say %u", what, line, id, threads,
             barrier.expected);
    if (barrier.lanes[warp] >> lane & 1)
        fail("%s (line %d): the thread comes to barrier %d again before the others came", what, line, id);
    if (barrier.lanes[warp] && barrier.lines[warp] != line)
        fail("the warp diverges: this lane is at %s (line %d), others are at line %d", what, line,
             barrier.lines[warp]);
    barrier.lanes[warp] |= 1u << lane;
    barrier.lines[warp] = line;
    if (++barrier.arrived < barrier.expected) {
        if (waits) wait(&barrier.generation, what, line);
        return;
    }
    barrier.arrived = 0;
    memset(barrier.lanes, 0, sizeof barrier.lanes);
    ++barrier.generation;
}

void named_barrier_sync(int id, int threads, int line = __builtin_LINE()) {
    arrive("named_barrier_sync", id, unsigned(threads), line, true);
}

void named_barrier_arrive(int id, int threads, int line = __builtin_LINE()) {
    arrive("named_barrier_arrive", id, unsigned(threads), line, false);
}

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(shared_low); }

void check_shared(const char* what, int line, const void* pointer, size_t bytes) {
    const char* p = static_cast<const char*>(pointer);
    const bool dynamic = p >= shared_low && p + bytes <= shared_low + shared_bytes;
    const bool fixed = p >= __start_rwkv_shared && p + bytes <= __stop_rwkv_shared;
    if (!dynamic && !fixed) {
        if (p >= shared_low - GUARD && p < shared_low + shared_bytes + GUARD)
            fail("%s (line %d): byte %td of the dynamic shared memory, which has %zu", what, line,
                 p - shared_low, shared_bytes);
        fail("%s (line %d): the address is not in shared memory", what, line);
    }
    if (reinterpret_cast<uintptr_t>(p) % bytes)
        fail("%s (line %d): an address of shared memory that is no multiple of %zu bytes", what, line, bytes);
}

// --- numbers ---------------------------------------------------------------------------------

float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

float bf16_to_float(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

uint16_t float_to_bf16(float x) {
    const uint32_t bits = to_bits(x);
    if (__builtin_isnan(x)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float f16_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float value = float(fraction) * 0x1p-24f;
    return sign ? -value : value;
}

uint16_t float_to_f16(float x) {
    const uint16_t sign = uint16_t(to_bits(x) >> 16 & 0x8000);
    const float size = fabsf(x);
    if (__builtin_isnan(x)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | uint16_t(rintf(size * 0x1p24f));  // may round up to 2^-14
    const uint32_t bits = to_bits(size);
    return sign | uint16_t((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

uint32_t float_to_tf32(float x) {
    const uint32_t bits = to_bits(x);
    return __builtin_isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits & ~0x1fffu;
}

uint32_t pack_f16(float low, float high) { return float_to_f16(low) | uint32_t(float_to_f16(high)) << 16; }
uint32_t pack_bf16(float low, float high) { return float_to_bf16(low) | uint32_t(float_to_bf16(high)) << 16; }

float2 unpack_f16(uint32_t bits) { return {f16_to_float(uint16_t(bits)), f16_to_float(uint16_t(bits >> 16))}; }
float2 unpack_bf16(uint32_t bits) { return {from_bits(bits << 16), from_bits(bits & 0xffff0000u)}; }

float exp2_approx(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

// --- what a warp does together ---------------------------------------------------------------

struct Load { uint32_t* r; const void* row; };

template <int count, bool transposed>
void ldmatrix(const char* what, uint32_t* r, const void* row, int line) {
    if (current->thread % 32 < 8 * count) check_shared(what, line, row, 16);
    Load mine{r, row};
    meet(what, ALL, true, line, mine, [](Load** lanes) {
        for (int i = 0; i < count; ++i) {
            uint16_t matrix[8][8];
            int banks[8] = {}, most = 0;
            for (int row = 0; row < 8; ++row) {
                const void* from = lanes[8 * i + row]->row;
                memcpy(matrix[row], from, 16);
                const int bank = int(reinterpret_cast<uintptr_t>(from) / 16 % 8);
                if (++banks[bank] > most) most = banks[bank];
            }
            conflicts += unsigned(most - 1);
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, t = lane % 4 * 2;
                const uint16_t low = transposed ? matrix[t][g] : matrix[g][t];
                const uint16_t high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
                lanes[lane]->r[i] = low | uint32_t(high) << 16;
            }
        }
    });
}

void ldmatrix_x4(uint32_t* r, const void* row, int line = __builtin_LINE()) {
    ldmatrix<4, false>("ldmatrix_x4", r, row, line);
}
void ldmatrix_x4_trans(uint32_t* r, const void* row, int line = __builtin_LINE()) {
    ldmatrix<4, true>("ldmatrix_x4_trans", r, row, line);
}
void ldmatrix_x2(uint32_t* r, const void* row, int line = __builtin_LINE()) {
    ldmatrix<2, false>("ldmatrix_x2", r, row, line);
}
void ldmatrix_x2_trans(uint32_t* r, const void* row, int line = __builtin_LINE()) {
    ldmatrix<2, true>("ldmatrix_x2_trans", r, row, line);
}

struct Product { float* c; const uint32_t *a, *b; };

template <int K>
__attribute__((optimize("O3"), no_sanitize("undefined"))) void multiply(Product** lanes, const float (&a)[16][K], const float (&b)[K][8]) {
    double c[16][8];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = lanes[lane]->c[i];
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < K; ++k)
            for (int column = 0; column < 8; ++column) c[row][column] += double(a[row][k]) * double(b[k][column]);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) lanes[lane]->c[i] = float(c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
}

template <float decode(uint16_t)>
void mma_16(const char* what, float* c, const uint32_t* a, const uint32_t* b, int line) {
    Product mine{c, a, b};
    meet(what, ALL, true, line, mine, [](Product** lanes) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 4; ++i)
                    a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] =
                        decode(uint16_t(lanes[lane]->a[i] >> 16 * half));
                for (int i = 0; i < 2; ++i)
                    b[2 * t + i * 8 + half][g] = decode(uint16_t(lanes[lane]->b[i] >> 16 * half));
            }
        }
        multiply<16>(lanes, a, b);
    });
}

void mma_f16(float* c, const uint32_t* a, const uint32_t* b, int line = __builtin_LINE()) {
    mma_16<f16_to_float>("mma_f16", c, a, b, line);
}
void mma_bf16(float* c, const uint32_t* a, const uint32_t* b, int line = __builtin_LINE()) {
    mma_16<bf16_to_float>("mma_bf16", c, a, b, line);
}

void mma_tf32(float* c, const uint32_t* a, const uint32_t* b, int line = __builtin_LINE()) {
    Product mine{c, a, b};
    meet("mma_tf32", ALL, true, line, mine, [](Product** lanes) {
        float a[16][8], b[8][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = from_bits(lanes[lane]->a[i] & ~0x1fffu);
            for (int i = 0; i < 2; ++i) b[t + i * 4][g] = from_bits(lanes[lane]->b[i] & ~0x1fffu);
        }
        multiply<8>(lanes, a, b);
    });
}

template <class T> struct Shuffle { T value, result; int source; };

// `source` is the lane to read from, out of the caller's segment for its own value.
template <class T>
T shuffle(const char* what, uint32_t mask, T value, int source, int line) {
    Shuffle<T> mine{value, value, source};
    if (!(mask >> source & 1)) fail("%s (line %d): reads lane %d, which the mask 0x%08x lacks", what, line, source, mask);
    meet(what, mask, false, line, mine, [mask](Shuffle<T>** lanes) {
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) lanes[lane]->result = lanes[lanes[lane]->source]->value;
    });
    return mine.result;
}

void check_width(const char* what, int width, int line) {
    if (width < 1 || width > 32 || (width & (width - 1))) fail("%s (line %d): width %d", what, line, width);
}

// --- copies to shared memory -----------------------------------------------------------------

void cp_async_16(void* to, const void* from, bool valid = true, int line = __builtin_LINE()) {
    current->line = line;
    check_shared("cp_async_16", line, to, 16);
    if (valid && reinterpret_cast<uintptr_t>(from) % 16)
        fail("cp_async_16 (line %d): the source is not aligned to 16 bytes", line);
    memset(to, 0xff, 16);
    current->open.push_back({to, from, valid});
}

void cp_async_commit() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}

template <int n>
void cp_async_wait() {
    while (current->groups.size() > size_t(n)) {
        for (const Copy& copy : current->groups.front())
            copy.valid ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
        current->groups.pop_front();
    }
}

// --- launching -------------------------------------------------------------------------------

// Memory that ends (to 16 bytes, for `alignment` 16) where the inaccessible begins.
char* guarded(size_t bytes, size_t alignment, std::string name) {
    const size_t inside = (bytes + PAGE - 1) / PAGE * PAGE;
    void* map = mmap(nullptr, inside + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return nullptr;
    char* begin = static_cast<char*>(map);
    if (inside) mprotect(begin + GUARD, inside, PROT_READ | PROT_WRITE);
    char* low = begin + GUARD + inside - (bytes + alignment - 1) / alignment * alignment;
    regions.push_back({begin, low, low + bytes, begin + inside + 2 * GUARD, std::move(name)});
    return low;
}

void release(char* low) {
    for (size_t i = 0; i < regions.size(); ++i)
        if (regions[i].low == low) {
            munmap(regions[i].begin, size_t(regions[i].end - regions[i].begin));
            regions.erase(regions.begin() + long(i));
            return;
        }
}

char place_of_fault[64];

void on_signal(int number, siginfo_t* info, void* context) {
    const mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    const unsigned long long instruction = static_cast<unsigned long long>(machine.gregs[REG_RIP]);
#else
    const unsigned long long instruction = machine.pc;
#endif
    snprintf(place_of_fault, sizeof place_of_fault, "%llx", instruction);
    const int line = current ? current->line : 0;
    if (number == SIGILL || number == SIGTRAP)
        fail("a misaligned access, a local array index out of bounds or a division by zero, after line %d", line);
    const char* address = static_cast<const char*>(info->si_addr);
    for (const Region& region : regions)
        if (address >= region.begin && address < region.end)
            fail("accesses byte %td of %s, which has %td, after line %d", address - region.low,
                 region.name.c_str(), region.high - region.low, line);
    fail("accesses memory that is not there (address %p) or misaligned, after line %d", info->si_addr, line);
}

void report_deadlock() {
    std::string text;
    size_t returned = 0;
    std::vector<bool> told(fibers.size());
    for (size_t i = 0; i < fibers.size(); ++i) {
        if (fibers[i].done) ++returned;
        if (fibers[i].done || told[i]) continue;
        size_t count = 0;
        for (size_t j = i; j < fibers.size(); ++j)
            if (!fibers[j].done && fibers[j].line == fibers[i].line && !strcmp(fibers[j].what, fibers[i].what)) {
                told[j] = true;
                ++count;
            }
        char part[128];
        snprintf(part, sizeof part, "%s%zu (first: %zu) wait at %s (line %d)", text.empty() ? "" : ", ", count, i,
                 fibers[i].what, fibers[i].line);
        text += part;
    }
    current = nullptr;
    fail("block (%u, %u, %u): its threads wait for ever: %s; %zu have returned", blockIdx.x, blockIdx.y, blockIdx.z,
         text.c_str(), returned);
}

void run_block(bool descending) {
    const size_t slack = (shared_bytes + 127) / 128 * 128 - shared_bytes;
    memset(shared_low, 0xff, shared_bytes);
    memset(shared_low + shared_bytes, 0xa5, slack);
    if (__start_rwkv_shared) memset(__start_rwkv_shared, 0xff, size_t(__stop_rwkv_shared - __start_rwkv_shared));
    memset(barriers, 0, sizeof barriers);
    for (auto& warp : warps) warp.clear();
    for (Fiber& fiber : fibers) {
        fiber.done = false;
        fiber.waits = nullptr;
        fiber.line = 0;
        fiber.open.clear();
        fiber.groups.clear();
    }
    size_t left = fibers.size();
    while (left) {
        bool moved = false;
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber& fiber = fibers[descending ? fibers.size() - 1 - i : i];
            if (fiber.done || (fiber.waits && *fiber.waits == fiber.seen)) continue;
            moved = true;
            fiber.waits = nullptr;
            current = &fiber;
            threadIdx = fiber.index;
            resume(fiber);
            left -= fiber.done;
        }
        if (!moved) report_deadlock();
    }
    current = nullptr;
    for (size_t i = 0; i < slack; ++i)
        if (shared_low[shared_bytes + i] != char(0xa5))
            fail("block (%u, %u, %u): writes byte %zu of the dynamic shared memory, which has %zu", blockIdx.x,
                 blockIdx.y, blockIdx.z, shared_bytes + i, shared_bytes);
}

// As a function of its own, so that nothing lives in registers where siglongjmp returns.
__attribute__((noinline)) bool run_grid(bool descending) {
    if (sigsetjmp(failed, 1)) return false;
    const unsigned long long blocks = 1ull * gridDim.x * gridDim.y * gridDim.z;
    for (unsigned long long i = 0; i < blocks; ++i) {
        const unsigned long long b = descending ? blocks - 1 - i : i;
        blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y),
                    unsigned(b / gridDim.x / gridDim.y)};
        run_block(descending);
    }
    return true;
}

template <class... A, size_t... i>
void call_with(void (*kernel)(A...), void** values, std::index_sequence<i...>) {
    kernel(*static_cast<std::remove_cv_t<A>*>(values[i])...);
}

template <class... A>
void call(void (*kernel)(A...), void** values) {
    call_with(kernel, values, std::index_sequence_for<A...>{});
}

template <class T>
constexpr char letter() {
    if (std::is_pointer_v<T>) return 'p';
    if (std::is_same_v<std::remove_cv_t<T>, float>) return 'f';
    if (std::is_integral_v<T> && sizeof(T) == 4) return 'i';
    if (std::is_integral_v<T> && sizeof(T) == 8) return 'l';
    return '?';
}

// One letter an argument: pointer, float, integer of 4 or (l) of 8 bytes.
template <class... A>
const char* signature(void (*)(A...)) {
    static const char letters[] = {letter<A>()..., 0};
    return letters;
}

}  // namespace emulator

extern "C" {

// The kernel's launch, or null, or a text that says what it did wrong.
const char* emulator_launch(void (*kernel)(void**), void** arguments, const unsigned* grid, const unsigned* block,
                            size_t shared_bytes, int descending) {
    using namespace emulator;
    const size_t threads = size_t(block[0]) * block[1] * block[2];
    if (threads == 0 || threads % 32 || threads > 1024) return "a block has 32 to 1024 threads, in whole warps";
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    entry = kernel;
    emulator::arguments = arguments;
    emulator::shared_bytes = shared_bytes;
    shared_low = guarded(shared_bytes, 128, "the dynamic shared memory");
    void* map = mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!shared_low || map == MAP_FAILED) return "no memory";
    char* stacks = static_cast<char*>(map);
    warps.assign(threads / 32, {});
    fibers.assign(threads, Fiber{});
    for (size_t i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread = unsigned(i);
        fiber.index = {unsigned(i % block[0]), unsigned(i / block[0] % block[1]), unsigned(i / block[0] / block[1])};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks + i * STACK;
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, run_fiber, 0);
    }
    const int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
    struct sigaction before[4], during = {};
    during.sa_sigaction = on_signal;
    during.sa_flags = SA_SIGINFO | SA_ONSTACK;
    static char alternate[64 << 10];
    stack_t stack = {}, stack_before;
    stack.ss_sp = alternate;
    stack.ss_size = sizeof alternate;
    sigaltstack(&stack, &stack_before);
    for (int i = 0; i < 4; ++i) sigaction(numbers[i], &during, &before[i]);
    current = nullptr;
    conflicts = 0;
    place_of_fault[0] = 0;
    const bool fine = run_grid(descending != 0);
    for (int i = 0; i < 4; ++i) sigaction(numbers[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
    fibers.clear();
    munmap(stacks, threads * STACK);
    release(shared_low);
    return fine ? nullptr : message;
}

void* emulator_guarded(size_t bytes, const char* name) { return emulator::guarded(bytes, 16, name); }
void emulator_release(void* low) { emulator::release(static_cast<char*>(low)); }

// Where the last launch failed, as an address of this library in hexadecimal, or empty.
const char* emulator_place() { return emulator::place_of_fault; }

// 8-row loads of matrices from shared memory that had to wait for a bank, in the last launch.
unsigned long long emulator_conflicts() { return emulator::conflicts; }
}

// --- CUDA's own names ------------------------------------------------------------------------

#define __global__ __attribute__((visibility("default"), noinline))
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static __attribute__((section("rwkv_shared")))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()

inline void __syncthreads(int line = __builtin_LINE()) {
    emulator::arrive("__syncthreads", 0, unsigned(emulator::fibers.size()), line, true);
}

inline void __syncwarp(unsigned mask = emulator::ALL, int line = __builtin_LINE()) {
    int nothing = 0;
    emulator::meet("__syncwarp", mask, false, line, nothing, [](int**) {});
}

inline void __threadfence_block() {}
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    emulator::check_width("__shfl_sync", width, line);
    const int lane = int(emulator::current->thread % 32);
    return emulator::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)), line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
    emulator::check_width("__shfl_xor_sync", width, line);
    const int lane = int(emulator::current->thread % 32), last = lane | (width - 1);
    return emulator::shuffle("__shfl_xor_sync", mask, value, (lane ^ bits) <= last ? lane ^ bits : lane, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    emulator::check_width("__shfl_down_sync", width, line);
    const int lane = int(emulator::current->thread % 32), source = lane + int(delta);
    return emulator::shuffle("__shfl_down_sync", mask, value, source <= (lane | (width - 1)) ? source : lane, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    emulator::check_width("__shfl_up_sync", width, line);
    const int lane = int(emulator::current->thread % 32), source = lane - int(delta);
    return emulator::shuffle("__shfl_up_sync", mask, value, source >= (lane & ~(width - 1)) ? source : lane, line);
}

inline float __uint_as_float(unsigned bits) { return emulator::from_bits(bits); }
inline unsigned __float_as_uint(float x) { return emulator::to_bits(x); }
inline float __int_as_float(int bits) { return emulator::from_bits(unsigned(bits)); }
inline int __float_as_int(float x) { return int(emulator::to_bits(x)); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
    const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }

template <class T> T __ldg(const T* pointer) { return *pointer; }

template <class T> T atomicAdd(T* pointer, T value) {
    const T old = *pointer;
    *pointer += value;
    return old;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
