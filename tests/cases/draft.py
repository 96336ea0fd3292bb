"""A student as the draft model of its own teacher (speculative decoding), the natural use of a cheap copy."""

from common import *

ids = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(3))
K = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
for label, layers in (
    ("gated_deltanet", {"default": "gated_deltanet"}),
    ("hybrid", {"default": "gla", "1": "attention"}),
    ("softmax", {"default": "softmax"}),
):
    s, t = student_of(layers=layers)
    want = t.generate(ids, **K)

    def run():
        got = t.generate(ids, assistant_model=s, **K)
        assert torch.equal(got, want), f"tokens differ: {got[0, 9:].tolist()} for {want[0, 9:].tolist()}"

    attempt(f"teacher.generate(assistant_model=student) [{label}]", run)
    attempt(
        f"student.generate(prompt_lookup_num_tokens=3) [{label}]",
        lambda: s.generate(ids, prompt_lookup_num_tokens=3, **K) is None or None,
    )
s2, t2 = tiny("llama", seed=4), tiny("llama")


def plain():
    got = t2.generate(ids, assistant_model=s2, **K)
    assert torch.equal(got, t2.generate(ids, **K))


attempt("(control: Llama drafts for Llama)", plain)
