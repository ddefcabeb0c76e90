"""Where the time of a visionary-serenity training step, or a forward pass, goes, kernel by kernel.

python tests/benchmarks/kernels.py --batch 64
python tests/benchmarks/kernels.py --batch 64 --inference
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from measure import autocast, parser, report
from torch.profiler import ProfilerActivity, profile

from convlstm_fish import ClipClassifier


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--activation", default="sigmoid")
    options.add_argument("--inference", action="store_true")
    args = options.parse_args()
    torch.manual_seed(0)
    network = ClipClassifier(4, (16, 32), 3, padding="valid", bias=False, recurrent_activation=args.activation)
    network.to(args.device).train(not args.inference)
    video = torch.rand(args.batch, 30, 4, 120, 160, device=args.device)
    label = torch.randint(0, 2, (args.batch, 1), device=args.device).float()

    def step() -> None:
        with autocast(args.device, args.dtype):
            logits = network(video)
        F.binary_cross_entropy_with_logits(logits.float().reshape(-1, 1), label).backward()

    @torch.no_grad()
    def infer() -> None:
        with autocast(args.device, args.dtype):
            network(video)

    run = infer if args.inference else step
    for _ in range(3):
        run()
    cuda = torch.device(args.device).type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as recorded:
        run()
        if cuda:
            torch.cuda.synchronize()
    rows = {}
    for event in recorded.key_averages():
        micro = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micro > 0:
            rows[event.key.removeprefix("void ").split("<")[0][-60:]] = {"ms": micro / 1e3, "launches": event.count}
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]["ms"])[:30])
    kind = "inference_kernels" if args.inference else "kernels"
    report(f"{kind}_{args.batch}_{args.dtype}", rows, args)


if __name__ == "__main__":
    main()
