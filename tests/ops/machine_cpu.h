// machine.cuh for the CPU: the CUDA threads of a block take turns, from barrier to barrier, and what a warp does
// together goes through memory and a barrier.
// Copies happen at once, so that this tells nothing of races; it does of every index.
// It is compiled for every kernel, hence C's headers, which take a tenth of the time of C++'s.
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE inline
#define KERNEL(THREADS, PROGRAMS) void

struct Index { int x, y; };
Index threadIdx, blockIdx, gridDim;

struct float4 { float x, y, z, w; };
struct float2 { float x, y; };
struct uint2 { u32 x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint2 __ldcs(const uint2* from) { return *from; }
inline void __stcs(uint2* to, uint2 value) { *to = value; }
template <class T> inline T min(T x, T y) { return y < x ? y : x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fabsf(float x) { return __builtin_fabsf(x); }

constexpr u32 SHARED_BYTES = 227 << 10;
alignas(128) unsigned char shared_memory[SHARED_BYTES];

inline void check(bool good, const char* what) {
    if (good) return;
    fprintf(stderr, "emulated kernel: %s is wrong\n", what);
    abort();
}

// The threads of a block, of which one runs.
constexpr int MOST_THREADS = 1024;
struct Threads {
    static constexpr size_t STACK_BYTES = 256 << 10;
    ucontext_t contexts[MOST_THREADS], outside;
    bool done[MOST_THREADS];
    char* stacks = (char*)malloc(MOST_THREADS * STACK_BYTES);  // taken as far as they are used
    int count, running, left, idle;                            // idle: turns since one came to a barrier or its end

    int next() const {
        int thread = running;
        do thread = (thread + 1) % count;
        while (done[thread]);
        return thread;
    }
    void yield() {
        check(++idle <= left + 1, "a barrier that some threads never come to");
        int from = running;
        threadIdx.x = running = next();
        if (running != from) swapcontext(&contexts[from], &contexts[running]);
    }
    void run(int threads, void (*thread)()) {
        check(threads <= MOST_THREADS, "the number of threads");
        for (int t = 0; t < threads; t++) {
            done[t] = false;
            getcontext(&contexts[t]);
            contexts[t].uc_stack.ss_sp = stacks + t * STACK_BYTES;
            contexts[t].uc_stack.ss_size = STACK_BYTES;
            makecontext(&contexts[t], thread, 0);
        }
        threadIdx.x = running = idle = 0, count = left = threads;
        swapcontext(&outside, &contexts[0]);
    }
    void end() {
        done[running] = true, idle = 0;
        if (--left == 0) setcontext(&outside);
        threadIdx.x = running = next();
        setcontext(&contexts[running]);
    }
};
Threads block;

struct Barrier {
    int count = 0, arrived = 0;
    unsigned phase = 0;
    void arrive(int threads) {
        check(count == 0 || count == threads, "the number of threads at a barrier");
        count = threads, block.idle = 0;
        if (++arrived == count) arrived = 0, phase++;
    }
    void arrive_and_wait(int threads) {
        unsigned mine = phase;
        arrive(threads);
        while (phase == mine) block.yield();
    }
};
Barrier waiting[16], warps[32];
u32 exchange[32][32][4];

inline void meet_warp() { warps[threadIdx.x / 32].arrive_and_wait(32); }
inline u32 (&own_exchange())[32][4] { return exchange[threadIdx.x / 32]; }
inline unsigned char* at(u32 address) {
    check(address < SHARED_BYTES, "an address in shared memory");
    return shared_memory + address;
}

inline u32 shared_base() { return 0; }
inline void copy(u32 to, const void* from, int bytes, bool exists) {
    check(to % bytes == 0 && (u64)from % bytes == 0 && to + bytes <= SHARED_BYTES, "a copy");
    if (exists)
        memcpy(at(to), from, bytes);
    else
        memset(at(to), 0, bytes);
}
inline void copy16(u32 to, const void* from, bool exists) { copy(to, from, 16, exists); }
inline void copy8(u32 to, const void* from, bool exists) { copy(to, from, 8, exists); }
inline void end_copies() {}
template <int COUNT, int PENDING> inline void wait_for_copies(int barrier) {
    waiting[barrier].arrive_and_wait(COUNT);
}
template <int COUNT> inline void meet(int barrier) { waiting[barrier].arrive_and_wait(COUNT); }
template <int COUNT> inline void tell(int barrier) { waiting[barrier].arrive(COUNT); }
inline void begin_products() {}
template <int PENDING = 0> inline void end_products() {}
inline void finish_products() {}
inline float at_most(float x, float bound) { return x > bound ? bound : x; }
inline float at_least(float x, float bound) { return x < bound ? bound : x; }
inline float fast_tanh(float x) { return __builtin_tanhf(x); }
inline float fast_exp2(float x) { return __builtin_exp2f(x); }

inline float unpack(u16 x) {
#if HALF
    _Float16 y;
    memcpy(&y, &x, 2);
    return (float)y;
#else
    u32 bits = (u32)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
#endif
}
inline u16 round(float x) {
#if HALF
    _Float16 y = (_Float16)x;
    u16 bits;
    memcpy(&bits, &y, 2);
    return bits;
#else
    u32 bits;
    memcpy(&bits, &x, 4);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
inline u32 pack(float low, float high) { return round(low) | (u32)round(high) << 16; }

inline int uniform(int x) { return x; }

inline float across(float x, int lanes) {
    int lane = threadIdx.x % 32;
    memcpy(&own_exchange()[lane][0], &x, 4);
    meet_warp();
    memcpy(&x, &own_exchange()[lane ^ lanes][0], 4);
    meet_warp();
    return x;
}

inline void load_transposed(u32 (&a)[4], u32 from) {
    int lane = threadIdx.x % 32;
    own_exchange()[lane][0] = from;
    meet_warp();
    for (int matrix = 0; matrix < 4; matrix++) {
        u32 both = 0;
        for (int i = 0; i < 2; i++) {
            u16 x;
            memcpy(&x, at(own_exchange()[matrix * 8 + lane % 4 * 2 + i][0]) + lane / 4 * 2, 2);
            both |= (u32)x << (16 * i);
        }
        a[matrix] = both;
    }
    meet_warp();
}

struct Matrix {
    u32 start;
    int leading, stride;
    Matrix(u64 bits)
        : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {}
    float along(int row, int k) const {  // 8 rows of 8 numbers of K
        return get(start + k / 8 * leading + row / 8 * stride + row % 8 * 16 + k % 8 * 2);
    }
    float across(int row, int k) const {  // 8 numbers of K, of 8 rows each
        return get(start + k / 8 * leading + row / 8 * stride + k % 8 * 16 + row % 8 * 2);
    }
    static float get(u32 address) {
        u16 x;
        memcpy(&x, at(address), 2);
        return unpack(x);
    }
};

template <int N> struct Product {
    static void add(float (&d)[N / 2], u64 a, u64 b, int keep) {
        int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        for (int i = 0; i < N / 2; i++) {
            int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float sum = keep ? d[i] : 0.f;
            for (int k = 0; k < 16; k++) sum += Matrix(a).along(row, k) * Matrix(b).along(column, k);
            d[i] = sum;
        }
    }
    static void add_transposed(float (&d)[N / 2], const u32 (&a)[4], u64 b) {
        int lane = threadIdx.x % 32;
        memcpy(own_exchange()[lane], a, 16);
        meet_warp();
        for (int i = 0; i < N / 2; i++) {
            int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; k++) {
                u32 both = own_exchange()[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
                d[i] += unpack((u16)(both >> (k % 2 * 16))) * Matrix(b).across(column, k);
            }
        }
        meet_warp();
    }
};

// The I-th of a kernel's arguments.
template <int I, class A, class... Rest> inline auto& argument(void** args) {
    if constexpr (I == 0)
        return *(A*)*args;
    else
        return argument<I - 1, Rest...>(args + 1);
}
template <int... I> struct Numbers {};
template <int N, int... I> struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I> struct UpTo<0, I...> { using Type = Numbers<I...>; };

template <class... A> struct Launch {
    static inline void (*kernel)(A...);
    static inline void** args;
    template <int... I> static void call(Numbers<I...>) { kernel(argument<I, A...>(args)...); }
    static void thread() {
        call(typename UpTo<sizeof...(A)>::Type());
        block.end();
    }
};
template <class... A> void run(void (*kernel)(A...), int grid_x, int grid_y, int threads, void** args) {
    Launch<A...>::kernel = kernel, Launch<A...>::args = args;
    for (int y = 0; y < grid_y; y++)
        for (int x = 0; x < grid_x; x++) {
            memset(shared_memory, 0xff, SHARED_BYTES);  // not a number, in either 16-bit format
            for (Barrier& barrier : waiting) barrier = {};
            for (Barrier& barrier : warps) barrier = {};
            blockIdx = {x, y}, gridDim = {grid_x, grid_y};
            block.run(threads, Launch<A...>::thread);
        }
}
