constexpr int UNITS = STEPS_X + STEPS_H;
constexpr int SUM_COLUMNS = 64;
constexpr int SUM_BLOCKS = (UNITS + 4 * GROUPS - 1) / (4 * GROUPS);
constexpr int STEPS_SUM = TILE_H * TILE_W / 16;
constexpr int PLANE_SUM = plane(TILE_H * TILE_W, 8);
constexpr int STAGE_SUM = BYTES_X + BYTES_H + 8 * PLANE_SUM;

// Adds patches(x | h)ᵀ da of the steps first .. first + steps - 1 to the gradients of the weights, in blocks of 16
// rows as the forward step reads them. Each program has its own sums, (UNITS * 16, 4 * HIDDEN); 64 columns a program.
KERNEL(THREADS, PROGRAMS) weight_gradients(
    const u16* x, const u16* h, const u16* da, float* sums, int clips, int first, int steps, int slots, int last,
    int reverse, int with_h, int fresh, int backwards, i64 x_n, i64 x_t, i64 h_n, i64 h_t, i64 da_n, i64 da_t
) {
    const u32 shared = shared_base();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int items = Tile::count<H, W>(clips) * steps;
    auto copy = [&](int item, u32 to) {
        if (backwards) item = items - 1 - item;
        const int s = first + item % steps, t = reverse ? last - s : s, before = reverse ? t + 1 : t - 1;
        const Tile tile = Tile::of<H, W>(item / steps);
        copy_input(to, x + tile.clip * x_n + t * x_t, tile.y0, tile.x0);
        const bool exists = s + with_h > 0;
        copy_image<HIDDEN / 8, PLANE_H>(
            to + BYTES_X, exists ? h + tile.clip * h_n + before * h_t : da, tile.y0 - 1, tile.x0 - 1, H, W, exists
        );
        copy_planes<8, TILE_H, TILE_W, PLANE_SUM>(
            to + BYTES_X + BYTES_H, da + tile.clip * da_n + s % slots * da_t + blockIdx.y * (8 * H * W * 8), tile.y0,
            tile.x0, true
        );
    };
    // Where this warp's blocks of 16 rows begin in the patches, and this lane's row of the matrices in them.
    u32 rows[SUM_BLOCKS];
#pragma unroll
    for (int b = 0; b < SUM_BLOCKS; b++) {
        const int unit = min((warp / 4 * SUM_BLOCKS + b) * 4 + warp % 4, UNITS - 1), chunk = lane / 8 % 2;
        int start;
        if (unit < STEPS_X && C_IN == 4) {
            start = (unit * PATCH_W + 2 * chunk) * 16;
        } else {
            const bool of_x = unit < STEPS_X;
            const int pairs = of_x ? (C_IN + 15) / 16 : HALVES, at = of_x ? unit : unit - STEPS_X, tap = at / pairs;
            start = of_x ? 0 : BYTES_X;
            start += (tap / 3 * PATCH_W + tap % 3) * 16 + (at % pairs * 2 + chunk) * (of_x ? PLANE_X : PLANE_H);
        }
        rows[b] = start + (lane / 16 * 8 + lane % 8) * 16;
    }
    float acc[SUM_BLOCKS][SUM_COLUMNS / 2] = {};
#pragma unroll
    for (int k = 0; k < STAGES - 1; k++) {
        const int item = blockIdx.x + k * gridDim.x;
        if (item < items) copy(item, shared + k * STAGE_SUM);
        end_copies();
    }
    for (int item = blockIdx.x, stage = 0; item < items; item += gridDim.x, stage = (stage + 1) % STAGES) {
        wait_for_copies<TEAM, STAGES - 2>(1);  // and everyone is done with the stage before
        const int last = item + (STAGES - 1) * gridDim.x;
        if (last < items) copy(last, shared + (stage + STAGES - 1) % STAGES * STAGE_SUM);
        end_copies();
        const u32 here = shared + stage * STAGE_SUM;
        const u64 columns = describe(here + BYTES_X + BYTES_H, 128, PLANE_SUM);
        // While one block of 16 pixels is multiplied the next one's rows are read.
        u32 a[2][SUM_BLOCKS][4];
#pragma unroll
        for (int b = 0; b < SUM_BLOCKS; b++) load_transposed(a[0][b], here + rows[b]);
#pragma unroll
        for (int k = 0; k < STEPS_SUM; k++) {
            begin_products();
#pragma unroll
            for (int b = 0; b < SUM_BLOCKS; b++)
                Product<SUM_COLUMNS>::add_transposed(
                    acc[b], a[k % 2][b], columns + k * 16
                );
            end_products<1>();
            const int next = k + 1;
            if (next == STEPS_SUM) continue;
#pragma unroll
            for (int b = 0; b < SUM_BLOCKS; b++)
                load_transposed(
                    a[next % 2][b],
                    here + rows[b] + (next / (TILE_W / 16) * PATCH_W + next % (TILE_W / 16) * 16) * 16
                );
        }
        finish_products();
    }
    float* const to = sums + (i64)blockIdx.x * (UNITS * 16 * GATES) + blockIdx.y * SUM_COLUMNS + lane % 4 * 2;
#pragma unroll
    for (int b = 0; b < SUM_BLOCKS; b++) {
        const int unit = (warp / 4 * SUM_BLOCKS + b) * 4 + warp % 4;
        if (unit >= UNITS) continue;
#pragma unroll
        for (int i = 0; i < SUM_COLUMNS / 2; i += 2) {
            float2* const at = (float2*)(to + (unit * 16 + lane / 4 + i / 2 % 2 * 8) * GATES + i / 4 * 8);
            const float2 old = fresh ? make_float2(0.f, 0.f) : *at;
            *at = make_float2(old.x + acc[b][i], old.y + acc[b][i + 1]);
        }
    }
}
