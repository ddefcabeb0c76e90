// What the kernels ask of the machine: copies into shared memory that run by themselves, products of a warpgroup, and
// conversions. A test replaces this file by one for the CPU.

typedef unsigned short u16;  // a bfloat16 or float16
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define KERNEL(THREADS, PROGRAMS) extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS)

extern __shared__ __align__(128) unsigned char shared_memory[];

DEVICE u32 shared_base() { return (u32)__cvta_generic_to_shared(shared_memory); }

// 16 or 8 bytes from global to shared memory, zeros where they do not exist.
DEVICE void copy16(u32 to, const void* from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0));
}
DEVICE void copy8(u32 to, const void* from, bool exists) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(exists ? 8 : 0));
}

// Waits at a barrier for so many threads, or only tells them.
template <int COUNT> DEVICE void meet(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}
template <int COUNT> DEVICE void tell(int barrier) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}

// A thread's copies since the last time are one group.
DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// The copies of so many threads, who share a barrier, but for the last PENDING groups, have arrived and may be
// multiplied. (A fence for all memory would wait for every store to arrive.)
template <int COUNT, int PENDING> DEVICE void wait_for_copies(int barrier) {
    asm volatile("cp.async.wait_group %0;\n\tfence.proxy.async.shared::cta;" ::"n"(PENDING) : "memory");
    meet<COUNT>(barrier);
}

DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// These products are one group; all but the last PENDING groups are done.
template <int PENDING = 0> DEVICE void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
DEVICE void finish_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Four 8x8 matrices from shared memory, transposed; lane l names row l % 8 of matrix l / 8.
DEVICE void load_transposed(u32 (&a)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(from)
                 : "memory");
}

// What is not a number stays so, which fminf and fmaxf would hide.
DEVICE float at_most(float x, float bound) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
    return y;
}
DEVICE float at_least(float x, float bound) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
    return y;
}
DEVICE float fast_tanh(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

// Two numbers, the first in the lower half.
DEVICE u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
DEVICE float unpack(u16 x) {
    float y;
#if HALF
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
#else
    y = __uint_as_float((u32)x << 16);
#endif
    return y;
}

DEVICE float across(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
// A number that is the same in all lanes of a warp, known to the compiler as such.
DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
