constexpr int COLUMNS_BACK = HIDDEN + C_X;
// With the input's gradient the tiles are those of the input: its pixel (0, 0) is the state's (PY - 1, PX - 1).
constexpr int HEIGHT_BACK = C_X ? HI : H, WIDTH_BACK = C_X ? WI : W;
constexpr int OFF_Y = C_X ? PY - 1 : 0, OFF_X = C_X ? PX - 1 : 0;

// The adjoint of both convolutions on da: gradients of h of the step before (may be unwanted), and of x.
KERNEL(THREADS, PROGRAMS) adjoint_step(
    const u16* da, u16* dh, u16* dx, const u16* weights, int clips, int backwards, i64 da_n, i64 dx_n
) {
    const u32 shared = shared_base(), stages = shared + STEPS_BACK * COLUMNS_BACK * 32 + team() * STAGES * BYTES_DA;
    const Place own;
    const int items = Tile::count<HEIGHT_BACK, WIDTH_BACK>(clips);
    auto copy = [&](const Tile& tile, u32 to) {
        copy_planes<GATES / 8, TILE_H + 2, PATCH_W, PLANE_DA>(
            to, da + tile.clip * da_n, tile.y0 + OFF_Y - 1, tile.x0 + OFF_X - 1, true
        );
    };
    copy_weights(shared, weights, STEPS_BACK * COLUMNS_BACK * 32);
    Turns turns(items, backwards);
    Tile tile = turns.tile<HEIGHT_BACK, WIDTH_BACK>(turns.first);
#pragma unroll
    for (int k = 0; k < STAGES - 1; k++) {
        const int item = turns.first + k * turns.step;
        if (item < items) copy(turns.tile<HEIGHT_BACK, WIDTH_BACK>(item), stages + k * BYTES_DA);
        end_copies();
    }
    for (int round = 0; round < turns.rounds; round++) {
        const u32 stage = round % STAGES;
        const int item = turns.first + round * turns.step, next = item + turns.step;
        const int last = item + (STAGES - 1) * turns.step;
        if (round == 0)
            wait_for_copies<THREADS, STAGES - 2>(0);  // the weights are everyone's
        else
            wait_for_copies<TEAM, STAGES - 2>(1 + turns.team);
        const Tile ahead = turns.tile<HEIGHT_BACK, WIDTH_BACK>(next);
        if (last < items)
            copy(turns.tile<HEIGHT_BACK, WIDTH_BACK>(last), stages + (round + STAGES - 1) % STAGES * BYTES_DA);
        end_copies();
        float acc[COLUMNS_BACK / 2];
        turns.begin();
        begin_products();
        convolve<COLUMNS_BACK, COLUMNS_BACK, GATES / 8, PLANE_DA>(
            acc, stages + stage * BYTES_DA + own.patch(), shared, true
        );
        end_products();
        turns.end(1);
        if (item >= items) break;  // the last round
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const int y1 = tile.y0 + own.y + row, x1 = tile.x0 + own.x, y = y1 + OFF_Y, x = x1 + OFF_X;
            const bool in_state = dh && (u32)y < (u32)H && (u32)x < (u32)W;
#pragma unroll
            for (int half = 0; half < COLUMNS_BACK / 16; half++) {
                Four value;
#pragma unroll
                for (int i = 0; i < 4; i++) value.v[i] = acc[place(half, row, i)];
                if (half < HALVES) {
                    if (in_state)
                        value.store(dh + tile.clip * (H * W * HIDDEN) + (y * W + x) * HIDDEN + half * 16 + own.channel);
                } else if (y1 < HI && x1 < WI && half * 16 - HIDDEN + own.channel < C_IN) {
                    value.store(dx + tile.clip * dx_n + (y1 * WI + x1) * C_IN + half * 16 - HIDDEN + own.channel);
                }
            }
        }
        tile = ahead;
    }
}
