# -inf in a real head: a teacher with a bias of -inf on padded rows, in subquad's own stage 3
from common import *

from subquad.config import EndToEndStage
from subquad.distill.end_to_end import EndToEndDistillation

t = tiny("phi", vocab_size=64, tie_word_embeddings=False)
with torch.no_grad():
    t.lm_head.bias[61:] = float("-inf")
ids = torch.randint(3, 61, (2, 14), generator=torch.Generator().manual_seed(3))


def go(divergence):
    s = subquad.linearize(t, "gla")
    o = EndToEndDistillation(t, EndToEndStage(tokens=100, lr=1e-4, divergence=divergence))
    out = s(objective=o, **o.forward_kwargs({"input_ids": ids}))
    assert out.loss.isfinite(), float(out.loss)


for divergence in ("forward", "reverse", "jsd"):
    attempt(f"{divergence} divergence from a teacher whose head masks padded tokens by -inf", lambda: go(divergence))
