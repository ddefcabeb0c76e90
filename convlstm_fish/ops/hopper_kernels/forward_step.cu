// h_t and c_t of all clips. h_in and c_in may be missing: the state is zero then. c_save may be missing.
KERNEL(THREADS, PROGRAMS) forward_step(
    const u16* x, const u16* h_in, u16* h_out, const float* c_in, float* c_out, u16* c_save, const u16* weights,
    const float* bias, int clips, int backwards, i64 x_n, i64 h_in_n, i64 h_out_n, i64 c_save_n
) {
    const u32 shared = shared_base(), stages = shared + BYTES_W + team() * STAGES * (BYTES_X + BYTES_H);
    const Place own;
    const int items = Tile::count<H, W>(clips);
    auto copy = [&](const Tile& tile, u32 to) {
        copy_input(to, x + tile.clip * x_n, tile.y0, tile.x0);
        copy_image<HIDDEN / 8, PLANE_H>(
            to + BYTES_X, h_in ? h_in + tile.clip * h_in_n : weights, tile.y0 - 1, tile.x0 - 1, H, W, h_in != nullptr
        );
    };
    // What a tile needs besides its patch is read a tile ahead.
    float4 c[HALVES][2];
    auto fetch = [&](const Tile& tile, bool wanted, int half) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const int at = own.pixel(tile, row);
            c[half][row] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (wanted && at >= 0 && c_in)
                c[half][row] =
                    *(const float4*)(c_in + (tile.clip * (H * W) + at) * HIDDEN + half * 16 + own.channel);
        }
    };
    copy_weights(shared, weights, BYTES_W);
    Turns turns(items, backwards);
    Tile tile = turns.tile<H, W>(turns.first);
#pragma unroll
    for (int k = 0; k < STAGES - 1; k++) {
        const int item = turns.first + k * turns.step;
        if (item < items) copy(turns.tile<H, W>(item), stages + k * (BYTES_X + BYTES_H));
        end_copies();
    }
#pragma unroll
    for (int half = 0; half < HALVES; half++) fetch(tile, turns.first < items, half);
    for (int round = 0; round < turns.rounds; round++) {
        const u32 stage = round % STAGES;
        const int item = turns.first + round * turns.step, next = item + turns.step;
        const int last = item + (STAGES - 1) * turns.step;
        if (round == 0)
            wait_for_copies<THREADS, STAGES - 2>(0);  // the weights are everyone's
        else
            wait_for_copies<TEAM, STAGES - 2>(1 + turns.team);  // and the team is done with the other stage
        const u32 here = stages + stage * (BYTES_X + BYTES_H);
        const Tile ahead = turns.tile<H, W>(next);
        if (last < items) copy(turns.tile<H, W>(last), stages + (round + STAGES - 1) % STAGES * (BYTES_X + BYTES_H));
        end_copies();
        float acc[GATES / 2];
        turns.begin();
        begin_products();
        make_gates<GATES>(acc, here, here + BYTES_X, shared, own.patch());
        end_products();
        turns.end(1);
        if (item >= items) break;  // the last round
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const Four before(c[half][row]);
                Four z[4], h, after;
                activate(z, acc + half * 32, bias + half * 16 + own.channel, row);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    after.v[i] = fmaf(z[1].v[i], before.v[i], z[0].v[i] * z[2].v[i]);
                    h.v[i] = z[3].v[i] * squash(after.v[i]);
                }
                const int at = own.pixel(tile, row);
                if (at < 0) continue;
                const int to = at * HIDDEN + half * 16 + own.channel;
                after.store(c_out + tile.clip * (H * W * HIDDEN) + to);
                if (c_save) after.store_once(c_save + tile.clip * c_save_n + to);
                h.store(h_out + tile.clip * h_out_n + to);
            }
            fetch(ahead, next < items, half);
        }
        tile = ahead;
    }
}
