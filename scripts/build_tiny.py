#!/usr/bin/env python
"""Builds grpo/models/tiny: a small Qwen2 and its tokenizer, from scratch, on generated sums.

    .venv/bin/python scripts/build_tiny.py [FOLDER]

The demonstrations work a sum out column by column in <think> and give it in <answer>. First all of
them are right, until the model can add; then part of them err, each in a way of its own, so that
the model learns to be unsure of what it knows. That is what GRPO meets in real models: a skill
that is there, sampled too rarely. Only problems of the training side of the split are shown.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from grpo.data.arithmetic import is_held_out

SYSTEM_PROMPTS = (
    "Think in <think></think>, then give the result in <answer></answer>.",
    "You are a helpful assistant.",
    "",
)
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WRONG_STEP = 0.30  # of the column sums, in the second stage
NO_TAGS = 0.12  # of the answers, in the second stage


def work_out_columns(
    a: int, b: int, operation: str, rng: random.Random, wrong: float
) -> tuple[str, str]:
    """The worked columns and the result they lead to; each column errs with probability `wrong`."""
    width = max(len(str(a)), len(str(b)))
    carry, digits, steps = 0, [], []
    for column in range(width):
        x, y = a // 10**column % 10, b // 10**column % 10
        if operation == "+":
            value = x + y + carry
            terms = f"{x}+{y}" + ("+1" if carry else "")
        else:
            borrow = x - carry < y and column < width - 1
            value = x - y - carry + (10 if borrow else 0)
            terms = f"{x + (10 if borrow else 0)}-{y}" + ("-1" if carry else "")
        if rng.random() < wrong:
            value = rng.choice([v for v in range(19 if operation == "+" else 10) if v != value])
        steps.append(f"{terms}={value}")
        digits.append(value % 10)
        carry = value // 10 if operation == "+" else int(borrow)
    if operation == "+" and carry:
        digits.append(carry)
    result = int("".join(map(str, reversed(digits))))
    return ", ".join(steps), str(result)


def draw_demonstration(
    rng: random.Random, wrong: float, no_tags: float
) -> tuple[list[dict[str, str]], str]:
    """One chat prompt and the completion to learn."""
    while True:
        a, b = rng.randrange(100), rng.randrange(100)
        operation = rng.choice("+-")
        if operation == "-":
            a, b = max(a, b), min(a, b)
        question = f"What is {a} {operation} {b}?"
        if not is_held_out(question):
            break
    steps, result = work_out_columns(a, b, operation, rng, wrong)
    system = rng.choice(SYSTEM_PROMPTS)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    answer = f"The answer is {result}." if rng.random() < no_tags else f"<answer>{result}</answer>"
    return messages, f"<think>{steps}</think>{answer}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 400 tokens; a digit, a tag and a chat mark are one token each."""
    rng = random.Random(0)
    texts = []
    for _ in range(2000):
        messages, completion = draw_demonstration(rng, 0.0, 0.5)
        texts += [message["content"] for message in messages] + [completion]
        texts += ["system\n", "user\n", "assistant\n"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tags = re.compile("|".join(TAGS))
    tokenizer.train_from_iterator((part for text in texts for part in tags.split(text)), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    wrong: float,
    no_tags: float,
    learning_rate: float,
    rows: int,
    seed: int,
) -> None:
    """Next-token training on the completions alone, cosine schedule with a short warm-up."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    end = tokenizer.eos_token
    started = time.time()
    for step in range(1, steps + 1):
        ids, labels = [], []
        for _ in range(rows):
            messages, completion = draw_demonstration(rng, wrong, no_tags)
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            p, c = tokenizer.encode(prompt), tokenizer.encode(completion + end)
            ids.append(p + c)
            labels.append([-100] * len(p) + c)
        width = max(map(len, ids))
        tokens = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
        targets = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
        loss = model(input_ids=tokens, labels=targets).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            greedy, sampled = measure_accuracy(model, tokenizer)
            print(
                f"{step}/{steps} loss {loss.item():.3f} greedy {greedy:.2f} sampled {sampled:.2f} "
                f"{time.time() - started:.0f} s",
                flush=True,
            )


@torch.no_grad()
def measure_accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> tuple[float, float]:
    """Held-out accuracy, greedy and at temperature 1, on 200 problems."""
    from grpo.data.arithmetic import Arithmetic

    examples = Arithmetic(size=1, eval_size=200).rows("test")
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template(
            [
                {"role": "system", "content": SYSTEM_PROMPTS[0]},
                {"role": "user", "content": example.question},
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
        for example in examples
    ]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    rates = []
    for do_sample in (False, True):
        out = model.generate(**encoded, max_new_tokens=36, do_sample=do_sample)
        texts = tokenizer.batch_decode(
            out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right = [e.verify(t) == 1 for e, t in zip(examples, texts, strict=True)]
        rates.append(sum(right) / len(right))
    return rates[0], rates[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("grpo/models/tiny"))
    parser.add_argument("--skill-steps", type=int, default=600)
    parser.add_argument("--doubt-steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, arguments.skill_steps, 0.0, 0.0, 2e-3, 128, seed=1)
    train(model, tokenizer, arguments.doubt_steps, WRONG_STEP, NO_TAGS, 1e-3, 128, seed=2)
    model.to(torch.bfloat16).save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
