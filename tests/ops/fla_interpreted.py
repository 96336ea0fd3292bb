"""Script: runs `fla`'s kernels in Triton's interpreter and prints their errors against `step` in float64, as JSON.

It is a script because TRITON_INTERPRET must be set before Triton is imported. Two changes make the kernels run without
a GPU: the autotuner takes its first configuration, since measuring needs a driver, and in a temporary copy of `fla` a
loop variable, which is an int in the interpreter, is not cast.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))


def copy_of_fla(folder):
    source = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
    shutil.copytree(source, Path(folder) / "fla")
    for file in (Path(folder) / "fla").rglob("*.py"):
        text = file.read_text()
        if "i_t.to(tl.int64)" in text:
            file.write_text(text.replace("i_t.to(tl.int64)", "(i_t + 0)"))
    sys.path.insert(0, folder)


def first_configuration(self, *args, **kwargs):
    return self.fn.run(*args, **(kwargs | self.configs[0].all_kwargs()))


def normalizer_errors(name, layout, gates):
    """Of `mlstm` and `normalized`, forward and backward, whose gates are "moderate" or "extreme"."""
    import torch

    from subquad import ops
    from tests.helpers.ops import differentiate, draw, draw_mlstm, errors, run_mlstm, ungrouped

    queries, high = (2 if layout == "grouped" else 1), (20.0 if gates == "extreme" else 3.0)
    case = draw_mlstm(96, queries=queries, state=True, low=-high, high=high)
    case["q"], case["k"], case["n"] = (case[name].abs() for name in ("q", "k", "n"))  # no normalizer near zero
    kwargs, torch_kwargs = {}, {"form": "step"}
    if layout == "packed":
        kwargs = torch_kwargs = {"cu_seqlens": torch.tensor([0, 0, 40, 96])}
        for state in ("S", "n", "m"):
            case[state] = case[state].repeat(3, *[1] * (case[state].dim() - 1))

    def op(**kwargs):
        if name == "mlstm":
            return run_mlstm(kwargs.pop("form", "chunk"), **kwargs)
        return lambda q, k, v, log_decay, S, n: ops.normalized(q, k, v, log_decay, (S, n), **kwargs)

    if name == "normalized":
        decays = draw(("scalar", False), T=96, log_decay=None if gates == "extreme" else -0.3)
        case = {n: x for n, x in case.items() if n in "qkvSn"} | {"log_decay": decays["log_decay"]}
    reference = differentiate(ungrouped(op(**torch_kwargs, backend="torch")), case)
    return errors(differentiate(op(**kwargs, backend="fla"), case, torch.float32), reference)


def short_conv_errors(layout):
    import torch

    from subquad import ops
    from tests.helpers.ops import differentiate, draw_conv, errors

    case = draw_conv(97, B=1 if layout == "packed" else 2) | {"initial_state": None}
    kwargs = {"activation": "silu"}
    if layout == "packed":
        kwargs["cu_seqlens"] = torch.tensor([0, 0, 1, 3, 3, 20, 97])
    reference = differentiate(ops.short_conv, case, **kwargs)  # PyTorch computes in float64
    return errors(differentiate(ops.short_conv, case, torch.float32, **kwargs), reference)


def main(decay, delta, op, layout, refused):
    with tempfile.TemporaryDirectory() as folder:
        copy_of_fla(folder)
        import torch
        import triton.runtime.autotuner as autotuner

        autotuner.Autotuner.run = first_configuration
        from subquad import ops
        from subquad.ops import fla
        from tests.helpers.ops import definition, differentiate, draw, errors

        fla.refuses_scalar_decay = lambda: refused
        if op == "short_conv":
            os.environ["SUBQUAD_BACKEND"] = "fla"
            print(json.dumps(short_conv_errors(layout)))
            assert "fla.modules.causal_conv1d" in sys.modules, "fla was not called"
            return
        if op in ("mlstm", "normalized"):
            print(json.dumps(normalizer_errors(op, layout, decay)))
            return
        queries = 2 if layout == "grouped" else 1
        case = draw((decay, delta), T=40 if op == "step" else 96, H=2, K=32, V=32, queries=queries)
        if decay != "none":
            gen = torch.Generator().manual_seed(4)
            case["log_decay"] = -torch.rand(case["log_decay"].shape, generator=gen).double()
        kwargs = {}
        reference = definition(case)
        if layout == "packed":
            bounds = torch.tensor([0, 40, 96])
            kwargs["cu_seqlens"] = bounds
            case["initial_state"] = case["initial_state"].repeat(2, 1, 1, 1)
            reference = definition(case, lambda **a: ops.chunk(**a, cu_seqlens=bounds, backend="torch"))
        if op == "step" and delta:
            with torch.no_grad():
                o, state = ops.step(**{n: None if x is None else x.float() for n, x in case.items()}, backend="fla")
            got = {"out0": o, "out1": state}
            reference = {n: reference[n] for n in got}
        else:
            got = differentiate(getattr(ops, op), case, torch.float32, backend="fla", **kwargs)
        assert any(name.startswith("fla.ops") for name in sys.modules), "fla was not called"
        print(json.dumps(errors(got, reference)))


if __name__ == "__main__":
    decay, delta, op, layout, *refused = sys.argv[1:]
    main(decay, delta == "delta", op, layout, bool(refused))
