// machine.cuh for the CPU: each CUDA thread is a thread, and what a warp does together goes through memory and a
// barrier.
// Copies happen at once, so that this tells nothing of races; it does of every index.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE inline
#define KERNEL(THREADS, PROGRAMS) void

struct Index { int x, y; };
thread_local Index threadIdx, blockIdx, gridDim;

struct float4 { float x, y, z, w; };
struct float2 { float x, y; };
struct uint2 { u32 x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint2 __ldcs(const uint2* from) { return *from; }
inline void __stcs(uint2* to, uint2 value) { *to = value; }
using std::min;
inline float __fdividef(float a, float b) { return a / b; }

constexpr u32 SHARED_BYTES = 227 << 10;
alignas(128) unsigned char shared_memory[SHARED_BYTES];
// A barrier of so many threads, made when the first of them comes.
struct Barrier {
    std::mutex lock;
    std::unique_ptr<std::barrier<>> made;
    std::barrier<>& at(int count) {
        std::lock_guard<std::mutex> held(lock);
        if (!made) made = std::make_unique<std::barrier<>>(count);
        return *made;
    }
};
Barrier waiting[16];
std::vector<std::unique_ptr<std::barrier<>>> warps;
u32 exchange[32][32][4];

inline void check(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "emulated kernel: %s is wrong\n", what);
    std::abort();
}
inline std::barrier<>& own_warp() { return *warps[threadIdx.x / 32]; }
inline u32 (&own_exchange())[32][4] { return exchange[threadIdx.x / 32]; }
inline unsigned char* at(u32 address) {
    check(address < SHARED_BYTES, "an address in shared memory");
    return shared_memory + address;
}

inline u32 shared_base() { return 0; }
inline void copy(u32 to, const void* from, int bytes, bool exists) {
    check(to % bytes == 0 && (u64)from % bytes == 0 && to + bytes <= SHARED_BYTES, "a copy");
    if (exists)
        std::memcpy(at(to), from, bytes);
    else
        std::memset(at(to), 0, bytes);
}
inline void copy16(u32 to, const void* from, bool exists) { copy(to, from, 16, exists); }
inline void copy8(u32 to, const void* from, bool exists) { copy(to, from, 8, exists); }
inline void end_copies() {}
template <int COUNT, int PENDING> inline void wait_for_copies(int barrier) {
    waiting[barrier].at(COUNT).arrive_and_wait();
}
template <int COUNT> inline void meet(int barrier) { waiting[barrier].at(COUNT).arrive_and_wait(); }
template <int COUNT> inline void tell(int barrier) { (void)waiting[barrier].at(COUNT).arrive(); }
inline void begin_products() {}
template <int PENDING = 0> inline void end_products() {}
inline void finish_products() {}
inline float at_most(float x, float bound) { return x > bound ? bound : x; }
inline float at_least(float x, float bound) { return x < bound ? bound : x; }
inline float fast_tanh(float x) { return std::tanh(x); }
inline float fast_exp2(float x) { return std::exp2(x); }

inline float unpack(u16 x) {
#if HALF
    _Float16 y;
    std::memcpy(&y, &x, 2);
    return (float)y;
#else
    u32 bits = (u32)x << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
#endif
}
inline u16 round(float x) {
#if HALF
    _Float16 y = (_Float16)x;
    u16 bits;
    std::memcpy(&bits, &y, 2);
    return bits;
#else
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
inline u32 pack(float low, float high) { return round(low) | (u32)round(high) << 16; }

inline int uniform(int x) { return x; }

inline float across(float x, int lanes) {
    int lane = threadIdx.x % 32;
    std::memcpy(&own_exchange()[lane][0], &x, 4);
    own_warp().arrive_and_wait();
    std::memcpy(&x, &own_exchange()[lane ^ lanes][0], 4);
    own_warp().arrive_and_wait();
    return x;
}

inline void load_transposed(u32 (&a)[4], u32 from) {
    int lane = threadIdx.x % 32;
    own_exchange()[lane][0] = from;
    own_warp().arrive_and_wait();
    for (int matrix = 0; matrix < 4; matrix++) {
        u32 both = 0;
        for (int i = 0; i < 2; i++) {
            u16 x;
            std::memcpy(&x, at(own_exchange()[matrix * 8 + lane % 4 * 2 + i][0]) + lane / 4 * 2, 2);
            both |= (u32)x << (16 * i);
        }
        a[matrix] = both;
    }
    own_warp().arrive_and_wait();
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
        std::memcpy(&x, at(address), 2);
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
        std::memcpy(own_exchange()[lane], a, 16);
        own_warp().arrive_and_wait();
        for (int i = 0; i < N / 2; i++) {
            int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; k++) {
                u32 both = own_exchange()[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
                d[i] += unpack((u16)(both >> (k % 2 * 16))) * Matrix(b).across(column, k);
            }
        }
        own_warp().arrive_and_wait();
    }
};

template <class... A, size_t... I>
void run(void (*kernel)(A...), int grid_x, int grid_y, int threads, void** args, std::index_sequence<I...>) {
    for (int y = 0; y < grid_y; y++)
        for (int x = 0; x < grid_x; x++) {
            std::memset(shared_memory, 0xff, SHARED_BYTES);  // not a number, in either 16-bit format
            for (Barrier& barrier : waiting) barrier.made.reset();
            warps.clear();
            for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<std::barrier<>>(32));
            std::vector<std::thread> all;
            for (int t = 0; t < threads; t++)
                all.emplace_back([=] {
                    threadIdx = {t, 0}, blockIdx = {x, y}, gridDim = {grid_x, grid_y};
                    kernel(*(A*)args[I]...);
                });
            for (auto& thread : all) thread.join();
        }
}
template <class... A> void run(void (*kernel)(A...), int grid_x, int grid_y, int threads, void** args) {
    run(kernel, grid_x, grid_y, threads, args, std::index_sequence_for<A...>());
}
