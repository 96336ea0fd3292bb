"""The headless backbone, as transformers' interface gives it (base_model, get_decoder()): trl, Liger, embedding and reward
code call it in place of the whole model. The hidden states must be those that the head of the student is given."""

from common import *

ids = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(3))
left = torch.ones_like(ids)
left[0, :5] = 0
right = torch.ones_like(ids)
right[0, 7:] = 0
pos = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]] * 2)
for attn in ("sdpa", "eager"):
    for label, layers in (
        ("teacher", None),
        ("gated_deltanet", {"default": "gated_deltanet"}),
        ("hybrid", {"default": "gla", "1": "attention"}),
        ("softmax", {"default": "softmax"}),
    ):
        t = tiny("llama")
        t.set_attn_implementation(attn)
        m = t if layers is None else shaken(subquad.linearize(t, layer_types=layers))
        m.eval()
        for how, kw in (
            ("no mask", {}),
            ("mask of ones", {"attention_mask": torch.ones_like(ids)}),
            ("left padding", {"attention_mask": left}),
            ("right padding", {"attention_mask": right}),
            ("packed positions", {"position_ids": pos}),
        ):
            real = kw.get("attention_mask", torch.ones_like(ids)).bool()

            def run():
                with torch.no_grad():
                    want = m(input_ids=ids, output_hidden_states=True, use_cache=False, **kw).hidden_states[-1]
                    got = m.get_decoder()(input_ids=ids, use_cache=False, **kw).last_hidden_state
                d = float((got - want)[real].norm() / want[real].norm())
                assert d < 1e-4, f"hidden states differ by {d:.2g} of their size"

            attempt(f"{attn} {label}: get_decoder(), {how}", run)

        def base():
            with torch.no_grad():
                o = m.base_model(input_ids=ids, attention_mask=left, use_cache=False)
                want = m(input_ids=ids, attention_mask=left, output_hidden_states=True, use_cache=False)
            kind = type(o).__name__
            if hasattr(o, "last_hidden_state"):
                d = float(
                    (o.last_hidden_state - want.hidden_states[-1])[left.bool()].norm()
                    / want.hidden_states[-1][left.bool()].norm()
                )
            else:
                d = float((o.logits - want.logits)[left.bool()].norm() / want.logits[left.bool()].norm())
            assert hasattr(o, "last_hidden_state") and d < 1e-4, f"gives {kind}; differs by {d:.2g} (left padding)"

        attempt(f"{attn} {label}: base_model is the headless backbone", base)
