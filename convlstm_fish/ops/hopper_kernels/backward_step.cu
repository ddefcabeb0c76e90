constexpr int BYTES_BACK = FUSED ? STEPS_BACK * HIDDEN * 32 : 0;
constexpr int STAGE_BACK = BYTES_X + BYTES_H + (FUSED ? BYTES_DA : 0);

// The gradients da of a step's gates before activation, in planes, and dc in place; equations as in the Triton kernel.
//
// The gradient of h is the sum of what is there: the adjoint product of da_next (FUSED), dh, dout.
KERNEL(THREADS, PROGRAMS) backward_step(
    const u16* x, const u16* h_in, const u16* c_in, const u16* da_next, const u16* dh, const u16* dout, float* dc,
    u16* da, const u16* weights, const u16* adjoint, const float* bias, float* dbias, int clips, int backwards, i64 x_n,
    i64 h_in_n, i64 c_in_n, i64 da_n, i64 dout_n
) {
    const u32 shared = shared_base(), stages = shared + BYTES_W + BYTES_BACK + team() * STAGES * STAGE_BACK;
    const Place own;
    const int items = Tile::count<H, W>(clips);
    auto copy = [&](const Tile& tile, u32 to) {
        copy_input(to, x + tile.clip * x_n, tile.y0, tile.x0);
        copy_image<HIDDEN / 8, PLANE_H>(
            to + BYTES_X, h_in ? h_in + tile.clip * h_in_n : weights, tile.y0 - 1, tile.x0 - 1, H, W, h_in != nullptr
        );
        if constexpr (FUSED)
            copy_planes<GATES / 8, TILE_H + 2, PATCH_W, PLANE_DA>(
                to + BYTES_X + BYTES_H, da_next ? da_next + tile.clip * da_n : weights, tile.y0 - 1, tile.x0 - 1,
                da_next != nullptr
            );
    };
    // What a tile needs besides its patch is read a tile ahead; what nobody reads again leaves the caches first.
    uint2 c[HALVES][2], from_out[HALVES][2], from_next[HALVES][2];
    float4 from_c[HALVES][2];
    auto fetch = [&](const Tile& tile, bool wanted, int half) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const int at = own.pixel(tile, row);
            const i64 from = at * HIDDEN + half * 16 + own.channel, all = tile.clip * (H * W * HIDDEN) + from;
            const bool exists = wanted && at >= 0;
            c[half][row] = from_out[half][row] = from_next[half][row] = make_uint2(0, 0);
            from_c[half][row] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (exists) from_c[half][row] = *(const float4*)(dc + all);
            if (exists && c_in) c[half][row] = __ldcs((const uint2*)(c_in + tile.clip * c_in_n + from));
            if (exists && dout) from_out[half][row] = __ldcs((const uint2*)(dout + tile.clip * dout_n + from));
            if (exists && dh) from_next[half][row] = __ldcs((const uint2*)(dh + all));
        }
    };
    copy_weights(shared, weights, BYTES_W);
    if constexpr (FUSED) copy_weights(shared + BYTES_W, adjoint, BYTES_BACK);
    Turns turns(items, backwards);
    Tile tile = turns.tile<H, W>(turns.first);
#pragma unroll
    for (int k = 0; k < STAGES - 1; k++) {
        const int item = turns.first + k * turns.step;
        if (item < items) copy(turns.tile<H, W>(item), stages + k * STAGE_BACK);
        end_copies();
    }
#pragma unroll
    for (int half = 0; half < HALVES; half++) fetch(tile, turns.first < items, half);
    float bias_sums[HAS_BIAS ? GATES / 4 : 1] = {};
    for (int round = 0; round < turns.rounds; round++) {
        const u32 stage = round % STAGES;
        const int item = turns.first + round * turns.step, next = item + turns.step;
        const int last = item + (STAGES - 1) * turns.step;
        if (round == 0)
            wait_for_copies<THREADS, STAGES - 2>(0);  // the weights are everyone's
        else
            wait_for_copies<TEAM, STAGES - 2>(1 + turns.team);
        const u32 here = stages + stage * STAGE_BACK;
        const Tile ahead = turns.tile<H, W>(next);
        if (last < items) copy(turns.tile<H, W>(last), stages + (round + STAGES - 1) % STAGES * STAGE_BACK);
        end_copies();
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            float acc[32], back[8];
            turns.begin();
            begin_products();
            make_gates<64>(acc, here, here + BYTES_X, shared + half * 1024, own.patch());
            if constexpr (FUSED)
                convolve<16, HIDDEN, GATES / 8, PLANE_DA>(
                    back, here + BYTES_X + BYTES_H + own.patch(), shared + BYTES_W + half * 256, true
                );
            end_products();
            turns.end(HALVES);
            if (item >= items) continue;
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const Four before(c[half][row]), of_out(from_out[half][row]), of_next(from_next[half][row]),
                    of_c(from_c[half][row]);
                Four z[4], d[4], dc_out;
                activate(z, acc, bias + half * 16 + own.channel, row);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float i = z[0].v[k], f = z[1].v[k], g = z[2].v[k], o = z[3].v[k];
                    const float squashed = squash(fmaf(f, before.v[k], i * g));
                    float dh_here = of_out.v[k] + of_next.v[k];
                    if constexpr (FUSED) dh_here += back[place(0, row, k)];
                    const float dc_here = of_c.v[k] + dh_here * o * (1.f - squashed * squashed);
                    d[0].v[k] = dc_here * g * slope(i);
                    d[1].v[k] = dc_here * before.v[k] * slope(f);
                    d[2].v[k] = dc_here * i * (1.f - g * g);
                    d[3].v[k] = dh_here * squashed * slope(o);
                    dc_out.v[k] = dc_here * f;
                }
                const int at = own.pixel(tile, row);
                if (at < 0) continue;
                dc_out.store(dc + (tile.clip * (H * W) + at) * HIDDEN + half * 16 + own.channel);
                const int chunk = half * 2 + own.channel / 8;
                u16* const to = da + tile.clip * da_n + (chunk * H * W + at) * 8 + own.channel % 8;
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    d[part].store(to + part * (HIDDEN * H * W));
                    if constexpr (HAS_BIAS) {
#pragma unroll
                        for (int i = 0; i < 4; i++) bias_sums[(part * HALVES + half) * 4 + i] += d[part].v[i];
                    }
                }
            }
            fetch(ahead, next < items, half);
        }
        tile = ahead;
    }
    if constexpr (HAS_BIAS) {  // a warp has its own row of sums, so that they are added in one order
        float* const to = dbias + (blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * GATES;
#pragma unroll
        for (int k = 0; k < GATES / 4; k++) {
            float sum = bias_sums[k];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) sum += across(sum, lanes);
            if (threadIdx.x % 32 < 4) to[k / 4 / HALVES * HIDDEN + k / 4 % HALVES * 16 + own.channel + k % 4] += sum;
        }
    }
}
