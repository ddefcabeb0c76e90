// h_t and c_t of all clips. h_in and c_in may be missing: the state is zero then. c_save may be missing.
KERNEL(THREADS, PROGRAMS) forward_step(
    const u16* x, const u16* h_in, u16* h_out, const float* c_in, float* c_out, u16* c_save, const u16* weights,
    const float* bias, int clips, i64 x_n, i64 h_in_n, i64 h_out_n, i64 c_save_n
) {
    const u32 shared = shared_base(), stages = shared + BYTES_W + team() * 2 * (BYTES_X + BYTES_H);
    const Place own;
    const int items = Tile::count<H, W>(clips);
    auto copy = [&](int item, u32 to) {
        Tile tile = Tile::of<H, W>(item);
        copy_input(to, x + tile.clip * x_n, tile.y0, tile.x0);
        copy_image<HIDDEN / 8, PLANE_H>(
            to + BYTES_X, h_in ? h_in + tile.clip * h_in_n : weights, tile.y0 - 1, tile.x0 - 1, H, W, h_in != nullptr
        );
    };
    // What a tile needs besides its patch is read a tile ahead.
    float4 c[HALVES][2];
    auto fetch = [&](int item, int half) {
        const Tile tile = Tile::of<H, W>(item);
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const int at = own.pixel(tile, row);
            c[half][row] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (item < items && at >= 0 && c_in)
                c[half][row] =
                    *(const float4*)(c_in + (tile.clip * (H * W) + at) * HIDDEN + half * 16 + own.channel);
        }
    };
    copy_weights(shared, weights, BYTES_W);
    Turns turns(items);
    if (turns.first < items) copy(turns.first, stages);
#pragma unroll
    for (int half = 0; half < HALVES; half++) fetch(turns.first, half);
    wait_for_copies<THREADS>(0);
    for (int round = 0; round < turns.rounds; round++) {
        const u32 stage = round % 2;
        const int item = turns.first + round * turns.step, next = item + turns.step;
        if (round > 0) wait_for_copies<TEAM>(1 + turns.team);  // and the team is done with the other stage
        const u32 here = stages + stage * (BYTES_X + BYTES_H);
        if (next < items) copy(next, stages + (stage ^ 1) * (BYTES_X + BYTES_H));
        const Tile tile = Tile::of<H, W>(item);
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            float acc[32];
            turns.begin();
            begin_products();
            make_gates(acc, here, here + BYTES_X, shared, own.patch(), half);
            end_products();
            turns.end(HALVES);
            if (item >= items) continue;
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const Four before(c[half][row]);
                Four z[4], h, after;
                activate(z, acc, bias + half * 16 + own.channel, row);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    after.v[i] = fmaf(z[1].v[i], before.v[i], z[0].v[i] * z[2].v[i]);
                    h.v[i] = z[3].v[i] * squash(after.v[i]);
                }
                const int at = own.pixel(tile, row);
                if (at < 0) continue;
                const int to = at * HIDDEN + half * 16 + own.channel;
                after.store(c_out + tile.clip * (H * W * HIDDEN) + to);
                if (c_save) after.store(c_save + tile.clip * c_save_n + to);
                h.store(h_out + tile.clip * h_out_n + to);
            }
            fetch(next, half);
        }
    }
}
