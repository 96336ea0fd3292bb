"""transformers.Trainer with gradient accumulation over rows of unequal length: the gradient of a step must be that of
the whole batch (what Trainer gives every model that takes num_items_in_batch)."""

from common import *
from transformers import Trainer, TrainingArguments

LENGTHS = [60, 4, 6, 5]
g = torch.Generator().manual_seed(0)
ROWS = [torch.randint(3, 61, (n,), generator=g) for n in LENGTHS]


def collate(rows):
    T = max(len(r["input_ids"]) for r in rows)
    pad = lambda x, v: torch.cat([x, x.new_full((T - len(x),), v)])
    ids = torch.stack([pad(r["input_ids"], 0) for r in rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.stack([pad(torch.ones_like(r["input_ids"]), 0) for r in rows]),
        "labels": torch.stack([pad(r["input_ids"], -100) for r in rows]),
    }


def step(model, micro):
    model = __import__("copy").deepcopy(model)
    grads = {}

    class T(Trainer):
        def _get_train_sampler(self, *a, **k):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = TrainingArguments(
        output_dir=str(OUT / "c02"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=4 // micro,
        max_steps=1,
        learning_rate=1e-9,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        max_grad_norm=0,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    t = T(model=model, args=args, train_dataset=[{"input_ids": r} for r in ROWS], data_collator=collate)
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **k):
            grads.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    t.add_callback(Keep())
    t.train()
    loss = [h["loss"] for h in t.state.log_history if "loss" in h][0]
    return grads, loss


student, teacher = student_of("gated_deltanet")
for name, model in (("teacher (Llama)", teacher), ("student", student)):
    whole, l1 = step(model, 4)
    parts, l2 = step(model, 1)
    num = sum(float((whole[n] - parts[n]).square().sum()) for n in whole) ** 0.5
    den = sum(float(whole[n].square().sum()) for n in whole) ** 0.5
    report(
        f"{name}: 4 micro-batches of 1 give the gradient of one batch of 4",
        num / den < 1e-4,
        f"relative error {num / den:.3g}; logged loss {l1:.4f} (whole) {l2:.4f} (accumulated)",
    )
