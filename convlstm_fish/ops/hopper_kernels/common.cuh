// One time step of a ConvLSTM on Hopper's warpgroup products: forward, backward, and the weights' gradients.
//
// A program keeps its weights in shared memory and goes from tile to tile; a tile is WY x WX blocks of 8 x 8 pixels,
// one a warpgroup. Its patch, the tile with a halo of one pixel, lies in shared memory in planes of 8 channels, 16
// bytes a pixel. In that layout 8 neighbouring pixels are one of the 8 x 16 byte matrices that a product reads,
// wherever they begin: the nine taps of a convolution are nine addresses, and no patch is ever written out. The next
// tiles' patches are copied while this one is multiplied.
//
// Constants: HIDDEN, C_IN (4, or a multiple of 16); sizes H, W of the state and HI, WI of the input, PY, PX its
// padding; WY, WX, and GROUPS of warpgroups in a team, TEAMS of them in a program, PROGRAMS a multiprocessor, STAGES of
// patches in shared memory; ACT (0 sigmoid, 1 Keras 2's hard sigmoid, 2 Keras 3's), FAST (the hardware's tanh), HALF
// (float16), HAS_BIAS, FUSED (the backward step makes the adjoint product itself), C_X (input channels whose gradient
// `adjoint_step` writes, rounded up to 16, or 0).

// Teams of warpgroups work on tiles of their own with the same weights.
constexpr int TEAM = 128 * GROUPS, THREADS = TEAM * TEAMS;
DEVICE int team() { return uniform(threadIdx.x / TEAM); }
DEVICE int rank() { return threadIdx.x % TEAM; }
constexpr int TILE_H = 8 * WY, TILE_W = 8 * WX;
constexpr int PATCH_W = TILE_W + 2;
constexpr int PATCH = (TILE_H + 2) * PATCH_W;
constexpr int GATES = 4 * HIDDEN;
constexpr int HALVES = HIDDEN / 16;

// Bytes from one plane to the next, such that a pixel's chunks of 8 channels fall into different banks.
constexpr int plane(int pixels, int chunks) {
    int bytes = pixels * 16;
    while (bytes % 128 != (chunks >= 8 ? 16 : 128 / chunks % 128)) bytes += 16;
    return bytes;
}
constexpr int PLANE_H = plane(PATCH, HIDDEN / 8);
constexpr int PLANE_X = C_IN == 4 ? 0 : plane(PATCH, C_IN / 8);
constexpr int PLANE_DA = plane(PATCH, GATES / 8);
constexpr int BYTES_H = PLANE_H * (HIDDEN / 8);
constexpr int BYTES_X = C_IN == 4 ? PATCH * 16 : PLANE_X * (C_IN / 8);
constexpr int BYTES_DA = PLANE_DA * (GATES / 8);

// Blocks of 16 rows of the weights, forward and adjoint: of 4 input channels a row of taps makes one, with a fourth
// tap of zeros.
constexpr int STEPS_X = C_IN == 4 ? 3 : 9 * (C_IN / 16);
constexpr int STEPS_H = 9 * HALVES;
constexpr int STEPS_BACK = 9 * GATES / 16;
constexpr int BYTES_W = (STEPS_X + STEPS_H) * GATES * 32;

DEVICE float squash(float x) {
#if FAST
    return fast_tanh(x);
#else
    float small = fast_exp2(-2.8853900817779268f * fabsf(x));
    float y = __fdividef(1.f - small, 1.f + small);
    return x < 0.f ? -y : y;
#endif
}

DEVICE float gate(float z) {
#if ACT == 0 && FAST
    return fmaf(0.5f, fast_tanh(0.5f * z), 0.5f);
#elif ACT == 0
    return __fdividef(1.f, 1.f + fast_exp2(-1.4426950408889634f * z));
#elif ACT == 1
    return at_most(at_least(fmaf(0.2f, z, 0.5f), 0.f), 1.f);
#else
    return at_most(at_least(z + 3.f, 0.f), 6.f) * (1.f / 6.f);
#endif
}

// Derivative of the gates' activation, from its value.
DEVICE float slope(float y) {
#if ACT == 0
    return y * (1.f - y);
#else
    return y > 0.f && y < 1.f ? (ACT == 1 ? 0.2f : 1.f / 6.f) : 0.f;
#endif
}

// Where a product finds its 8 x 16 byte matrices: `leading` bytes apart along K, `stride` along the other side; for a
// transposed operand the two are the same, and each matrix holds 8 numbers of the other side for each of 8 of K. Added
// to one of these, an offset in units of 16 bytes moves it.
DEVICE u64 describe(u32 start, int leading, int stride) {
    return (u64)(start >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32;
}

// How many of `pieces` a pass of a team takes, such that it takes few passes: a divisor of them.
constexpr int pieces_at_once(int pieces, int columns, int rows) {
    int best = 1, fewest = 1 << 30;
    for (int some = 1; some <= pieces; some++) {
        if (pieces % some || some * columns > TEAM) continue;
        const int high = TEAM / (some * columns), passes = pieces / some * ((rows + high - 1) / high);
        if (passes < fewest) best = some, fewest = passes;
    }
    return best;
}

// ROWS x COLUMNS pixels of an image from (y0, x0) on, zeros outside it or where it does not exist, into planes PLANE
// bytes apart. A pixel has CHUNKS chunks of 8 channels, one beside the other (STEP 8) or in planes of their own. A
// thread has one column and goes down the rows, so that an address is a sum with a constant.
template <int CHUNKS, int ROWS, int COLUMNS, int PLANE, int STEP>
DEVICE void copy_chunks(u32 to, const u16* image, int y0, int x0, int height, int width, bool exists) {
    constexpr int PIXEL = STEP == 8 ? CHUNKS * 8 : 8;
    constexpr int SOME = pieces_at_once(CHUNKS, COLUMNS, ROWS), HIGH = TEAM / (SOME * COLUMNS);
    const int piece = rank() % (SOME * COLUMNS), down = rank() / (SOME * COLUMNS);
    // Neighbouring threads read neighbouring bytes.
    const int chunk = STEP == 8 ? piece % SOME : piece / COLUMNS, across = STEP == 8 ? piece / SOME : piece % COLUMNS;
    const int x = x0 + across, y = y0 + down;
    const bool inside = exists && (u32)x < (u32)width;
    to += chunk * PLANE + (down * COLUMNS + across) * 16;
    const u16* const from = image + (y * width + x) * PIXEL + chunk * STEP;
#pragma unroll
    for (int first = 0; first < CHUNKS; first += SOME)
#pragma unroll
        for (int row = 0; row < ROWS; row += HIGH) {
            const bool here = inside && (u32)(y + row) < (u32)height;
            if (down < HIGH && down + row < ROWS)
                copy16(
                    to + first * PLANE + row * COLUMNS * 16,
                    here ? from + row * width * PIXEL + first * STEP : image, here
                );
        }
}

// The patch of an image, channels last.
template <int CHUNKS, int PLANE>
DEVICE void copy_image(u32 to, const u16* image, int y0, int x0, int height, int width, bool exists) {
    copy_chunks<CHUNKS, TILE_H + 2, PATCH_W, PLANE, 8>(to, image, y0, x0, height, width, exists);
}

// Pixels of CHUNKS planes of the gates' gradients. They lie in planes in global memory as well: copied from an image
// channels last, each 16 bytes would be a request of their own to the L2 cache, whose requests were the limit.
template <int CHUNKS, int ROWS, int COLUMNS, int PLANE>
DEVICE void copy_planes(u32 to, const u16* planes, int y0, int x0, bool exists) {
    copy_chunks<CHUNKS, ROWS, COLUMNS, PLANE, H * W * 8>(to, planes, y0, x0, H, W, exists);
}

// The patch of an image of 4 channels: each pixel beside its right neighbour, so that a pair of taps is one chunk.
DEVICE void copy_pairs(u32 to, const u16* image, int y0, int x0) {
    constexpr int HIGH = TEAM / (2 * PATCH_W);
    const int piece = rank() % (2 * PATCH_W), down = rank() / (2 * PATCH_W), x = x0 + piece / 2 + piece % 2;
    const u16* const from = image + ((y0 + down) * WI + x) * 4;
#pragma unroll
    for (int row = 0; row < TILE_H + 2; row += HIGH) {
        const bool here = (u32)x < (u32)WI && (u32)(y0 + down + row) < (u32)HI;
        if (down < HIGH && down + row < TILE_H + 2)
            copy8(to + ((down + row) * 2 * PATCH_W + piece) * 8, here ? from + row * WI * 4 : image, here);
    }
}

DEVICE void copy_input(u32 to, const u16* x, int y0, int x0) {
    if constexpr (C_IN == 4)
        copy_pairs(to, x, y0 - PY, x0 - PX);
    else
        copy_image<C_IN / 8, PLANE_X>(to, x, y0 - PY, x0 - PX, HI, WI, true);
}

DEVICE void copy_weights(u32 to, const u16* weights, int bytes) {
    for (int i = threadIdx.x; i < bytes / 16; i += THREADS) copy16(to + i * 16, weights + i * 8, true);
}

// acc (+)= the 3 x 3 convolution of a block of 8 x 8 pixels, whose patch begins at `patch`, with N of ALL columns.
template <int N, int ALL, int CHUNKS, int PLANE>
DEVICE void convolve(float (&acc)[N / 2], u32 patch, u32 weights, bool fresh) {
    const u64 a = describe(patch, PLANE, PATCH_W * 16), b = describe(weights, ALL * 16, 128);
#pragma unroll
    for (int tap = 0; tap < 9; tap++)
#pragma unroll
        for (int pair = 0; pair < CHUNKS / 2; pair++)
            Product<N>::add(
                acc, a + (tap / 3 * PATCH_W + tap % 3 + pair * 2 * (PLANE / 16)),
                b + (tap * (CHUNKS / 2) + pair) * ALL * 2, !(fresh && tap + pair == 0)
            );
}

// N columns of the gates before activation, 64 for 16 channels, of this warpgroup's pixels; `at` is the first one's
// place in the patch.
template <int N> DEVICE void make_gates(float (&acc)[N / 2], u32 x, u32 h, u32 weights, int at) {
    if constexpr (C_IN == 4) {
        const u64 a = describe(x + at, 32, PATCH_W * 16), b = describe(weights, GATES * 16, 128);
#pragma unroll
        for (int row = 0; row < 3; row++) Product<N>::add(acc, a + row * PATCH_W, b + row * GATES * 2, row > 0);
    } else {
        convolve<N, GATES, C_IN / 8, PLANE_X>(acc, x + at, weights, true);
    }
    convolve<N, GATES, HIDDEN / 8, PLANE_H>(acc, h + at, weights + STEPS_X * GATES * 32, false);
}

struct Tile {
    int y0, x0;
    i64 clip;
    template <int HEIGHT, int WIDTH>
    DEVICE static Tile of(int item) {
        constexpr int ACROSS = (WIDTH + TILE_W - 1) / TILE_W, ALL = ACROSS * ((HEIGHT + TILE_H - 1) / TILE_H);
        int tile = item % ALL;
        return {tile / ACROSS * TILE_H, tile % ACROSS * TILE_W, item / ALL};
    }
    template <int HEIGHT, int WIDTH>
    DEVICE static int count(int clips) {
        return clips * ((WIDTH + TILE_W - 1) / TILE_W) * ((HEIGHT + TILE_H - 1) / TILE_H);
    }
};

// Which pixels and channels a thread's numbers of a product belong to. The columns of a product are ordered such that
// they are, for each of two rows and each 16 channels, 4 neighbouring channels.
struct Place {
    int group_y, group_x, y, x, channel;
    DEVICE Place() {
        int group = uniform(rank() / 128), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        group_y = group / WX * 8;
        group_x = group % WX * 8;
        y = group_y + 2 * warp;  // and the row below
        x = group_x + lane / 4;
        channel = lane % 4 * 4;
    }
    // Of a tile's row, the pixel's number in the state; -1 if it lies outside.
    DEVICE int pixel(const Tile& tile, int row) const {
        const int y1 = tile.y0 + y + row, x1 = tile.x0 + x;
        return y1 < H && x1 < W ? y1 * W + x1 : -1;
    }
    DEVICE int patch() const { return (group_y * PATCH_W + group_x) * 16; }
};

struct Four {
    float v[4];
    DEVICE Four() : v{0.f, 0.f, 0.f, 0.f} {}
    DEVICE Four(float4 a) : v{a.x, a.y, a.z, a.w} {}
    DEVICE Four(uint2 a)
        : v{unpack((u16)a.x), unpack((u16)(a.x >> 16)), unpack((u16)a.y), unpack((u16)(a.y >> 16))} {}
    DEVICE void store(float* to) const { *(float4*)to = make_float4(v[0], v[1], v[2], v[3]); }
    DEVICE void store(u16* to) const { *(uint2*)to = make_uint2(pack(v[0], v[1]), pack(v[2], v[3])); }
    // What nobody reads soon.
    DEVICE void store_once(u16* to) const { __stcs((uint2*)to, make_uint2(pack(v[0], v[1]), pack(v[2], v[3]))); }
};

// Where in a product's numbers are those of a block of 16 columns, a row, and of 4 channels one.
DEVICE constexpr int place(int block, int row, int i) { return (block * 2 + i / 2) * 4 + row * 2 + i % 2; }

// The gates i, f, g, o of 16 channels.
DEVICE void activate(Four (&z)[4], const float* acc, const float* bias, int row) {
#pragma unroll
    for (int part = 0; part < 4; part++) {
        Four b;
        if (HAS_BIAS) b = Four(*(const float4*)(bias + part * HIDDEN));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float value = acc[place(part, row, i)] + b.v[i];
            z[part].v[i] = part == 2 ? squash(value) : gate(value);
        }
    }
}

// The tiles of a program, team by team, and whose turn it is to multiply. All teams would multiply at the same time, at
// a fraction of the speed, and then all do the arithmetic between two products, while the tensor cores idle; so one
// multiplies after the other while the others do their arithmetic.
struct Turns {
    int team, items, backwards, first, step, rounds, phase;
    DEVICE Turns(int items, int backwards)
        : team(::team()), items(items), backwards(backwards), first(team * gridDim.x + blockIdx.x),
          step(gridDim.x * TEAMS), rounds((items - (int)blockIdx.x + step - 1) / step), phase(0) {}
    // `backwards` from the last tile to the first: a launch begins where the one before it ended, with what that left
    // in the L2 cache.
    template <int HEIGHT, int WIDTH> DEVICE Tile tile(int item) const {
        return Tile::of<HEIGHT, WIDTH>(backwards ? items - 1 - item : item);
    }
    // Once in each of `phases` in a round, whether there is a tile or not.
    DEVICE void begin() {
        if (TEAMS > 1 && (team > 0 || phase > 0)) meet<2 * TEAM>(1 + TEAMS + team);
    }
    DEVICE void end(int phases) {
        phase++;
        const bool last = team == TEAMS - 1;
        if (TEAMS > 1 && !(last && phase == rounds * phases)) tell<2 * TEAM>(1 + TEAMS + (last ? 0 : team + 1));
    }
};
