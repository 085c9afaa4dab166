"""Bad input: one short message that names key, value and what is right; exit 2; nothing left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import Qwen2Config

from grpo.models.files import PACKAGE_FOLDER
from tests.conftest import run_grpo

Grpo = Callable[..., tuple[int, str]]
RUN = "hydra.run.dir=run"
WHOLE = ("dataset.slice=:", "dataset.eval_slice=:")
SEARCH = ("-m", "hydra/sweeper=optuna", "kl_weight=interval(0,1)")
QUICK = ("experiment=smoke", "tracking=none", RUN)


def write_files(folder: Path) -> None:
    """The files that the cases name."""
    good = {"question": "q", "answer": "#### 1"}
    lines = [json.dumps(good)] * 20
    (folder / "good.jsonl").write_text("\n".join(lines))
    (folder / "line17.jsonl").write_text("\n".join([*lines[:16], "{broken", *lines[17:]]))
    (folder / "list.jsonl").write_text("[1, 2]\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "unanswered.jsonl").write_text(json.dumps({"question": "q"}))
    (folder / "blank.jsonl").write_text(json.dumps({"question": "q", "answer": " "}))
    (folder / "unmarked.jsonl").write_text(json.dumps({"question": "q", "answer": "1"}))
    (folder / "not.parquet").write_text("no parquet")
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    (folder / "data.xls").write_text("")
    (folder / "good.csv").write_text("question,answer\n" + "q,1\n" * 20)
    (folder / "ragged.csv").write_text("question,answer\nq\n")
    (folder / "broken.json").write_text('[{"question": "q"},\n')
    (folder / "split").mkdir()
    for name in ("train", "test"):
        shutil.copy(folder / "good.csv", folder / f"split/{name}.csv")
    (folder / "a_file").write_text("")
    Qwen2Config().save_pretrained(folder / "no_weights")
    shutil.copytree(PACKAGE_FOLDER / "tiny", folder / "broken")
    (folder / "broken/model.safetensors").write_bytes(b"short")


CASES = {
    "unknown key": (["kl_wieght=0.1"], "kl_wieght: no such key", "kl_weight"),
    "unknown nested key": (["optim.warmup=3"], "optim.warmup: no such key", "optim.warmup_steps"),
    "unknown key of a group": (["dataset.digit=3"], "dataset.digit: no such key", "dataset.digits"),
    "unknown choice": (["model=tinny"], "model=tinny: no such choice", "tiny"),
    "no choice": (["tracking=null"], "tracking=null: no such choice", "tracking=none"),
    "a part of choices": (["dataset=_base"], "dataset=_base: no such choice", "arithmetic"),
    "a number for a choice": (["kl=0.1"], "kl=0.1: no such choice", "kl_weight=0.1"),
    "a checkpoint never, by nothing": (
        ["checkpoint.every=null"],
        "checkpoint.every=null",
        "number",
    ),
    "nothing kept": (["checkpoint.keep=null"], "checkpoint.keep=null", "number"),
    "no folder for Hydra's files": (
        ["hydra.output_subdir=null"],
        "hydra.output_subdir=null",
        "must be .hydra",
    ),
    "another working directory": (["hydra.job.chdir=true"], "hydra.job.chdir=true", "leave it out"),
    "a sweep's own folders": (
        ["-m", "seed=0,1", "hydra.sweep.subdir=x"],
        "hydra.sweep.subdir",
        "leave it out",
    ),
    "Hydra's own sweeper": (
        ["-m", "hydra/sweeper=basic", "seed=0,1"],
        "hydra/sweeper=basic",
        "grid",
    ),
    "a seed of the sampler, twice": (
        [
            "-m",
            "hydra/sweeper=optuna",
            "kl_weight=interval(0,1)",
            "+hydra.sweeper.sampler_options.seed=3",
        ],
        "hydra.sweeper.sampler_options.seed",
        "hydra.sweeper.seed",
    ),
    "several trials at once, one after the other": (
        [*SEARCH, "hydra.sweeper.n_jobs=2"],
        "hydra.sweeper.n_jobs=2",
        "hydra/launcher=joblib",
    ),
    "unknown group": (["modle=tiny"], "modle: no such key", "model"),
    "unknown experiment": (["experiment=smok"], "experiment=smok: no such choice", "smoke"),
    "key of a part that is off": (["adapter.rank=4"], "adapter.rank=4: adapter is none", "lora"),
    "key of a part that is switched off": (
        ["doctor=none", "doctor.window=3"],
        "doctor.window=3: doctor is none",
        "doctor=watch",
    ),
    "unknown job": (["trian"], "trian: no such job", "train"),
    "not an override": (["kl_weight=[1,"], "kl_weight=[1,", "key=value"),
    "a word for a number": (["batch_size=many"], "batch_size", "Integer"),
    "a fraction of a prompt": (["batch_size=1.5"], "batch_size", "Integer"),
    "no prompts": (["batch_size=0"], "batch_size=0", "at least 1"),
    "negative count": (["num_generation=-4"], "num_generation=-4", "at least 1"),
    "negative epochs": (["num_epochs=-1"], "num_epochs=-1", "at least 1"),
    "no steps": (["max_steps=0"], "max_steps=0", "at least 1"),
    "negative weight": (["kl_weight=-0.1"], "kl_weight=-0.1", "at least 0"),
    "weight that is no number": (["kl_weight=nan"], "kl_weight=nan", "at least 0"),
    "zero temperature": (["temperature=0"], "temperature=0", "more than 0"),
    "zero learning rate": (["learning_rate=0"], "learning_rate=0", "more than 0"),
    "group of one": (["num_generation=1"], "num_generation=1", "at least 2"),
    "group of one, another baseline": (
        ["num_generation=1", "algorithm.baseline=leave_one_out"],
        "algorithm.baseline=leave_one_out",
        "at least 2",
    ),
    "unknown baseline": (["algorithm.baseline=mean"], "algorithm.baseline=mean", "group_mean"),
    "unknown scale": (["algorithm.scale=std"], "algorithm.scale=std", "group_std"),
    "unknown ratio": (["algorithm.ratio=sequnce"], "algorithm.ratio=sequnce", "sequence"),
    "unknown averaging": (["algorithm.averaging=tokens"], "algorithm.averaging", "token_mean"),
    "averaging of one's own that is not there": (
        ["algorithm.averaging=my_module.mine"],
        "algorithm.averaging=my_module.mine",
        "my_module",
    ),
    "unknown aggregate": (
        ["algorithm.aggregate=sum_normalize"],
        "algorithm.aggregate=sum_normalize",
        "did you mean sum_then_normalize",
    ),
    "unknown key of a search": (
        ["-m", "hydra/sweeper=optuna", "kl_weight=interval(0,1)", "hydra.sweeper.prunr=median"],
        "hydra.sweeper.prunr: no such key",
        "did you mean hydra.sweeper.pruner",
    ),
    "a search's key without a search": (
        ["-m", "seed=0,1", "hydra.sweeper.pruner=median"],
        "hydra.sweeper.pruner: no such key",
        "did you mean hydra/sweeper=optuna hydra.sweeper.pruner?",
    ),
    "unknown key of Hydra's": (
        ["hydra.run.dirr=x"],
        "hydra.run.dirr: no such key",
        "did you mean hydra.run.dir",
    ),
    "unknown key of a reward": (
        ["+reward.answer.wieght=2"],
        "reward.answer.wieght: Answer takes no such key",
        "did you mean weight?",
    ),
    "unknown extractor": (["dataset.extract=tags"], "dataset.extract='tags'", "did you mean tag?"),
    "a name for a section": (["optim=adam"], "optim=adam: optim holds keys", "optim.name=adam"),
    "unknown loss": (["algorithm/policy_loss=clipp"], "algorithm/policy_loss=clipp", "clip"),
    "loss option": (["+algorithm.policy_loss.clip=1"], "policy_loss.clip", "clip_low"),
    "a word for a clip": (["algorithm.policy_loss.clip_low=x"], "clip_low=x", "number"),
    "more minibatches than prompts": (
        ["algorithm.minibatches=5"],
        "algorithm.minibatches=5",
        "batch_size=4",
    ),
    "no iterations": (["algorithm.num_iterations=0"], "num_iterations=0", "at least 1"),
    "no tokens": (["algorithm.top_entropy=0"], "algorithm.top_entropy=0", "more than 0"),
    "too many tokens": (["algorithm.top_entropy=2"], "algorithm.top_entropy=2", "at most 1"),
    "a cap below one": (["algorithm.importance_cap=0.5"], "importance_cap=0.5", "at least 1"),
    "negative bonus": (["algorithm.entropy_weight=-1"], "entropy_weight=-1", "at least 0"),
    "unknown estimator": (["kl.estimator=k4"], "kl.estimator=k4", "k1, k2, k3, full"),
    "unknown direction": (["kl.direction=backward"], "kl.direction=backward", "forward"),
    "unknown place": (["kl.within=loss_term"], "kl.within=loss_term", "loss, reward"),
    "a target from nothing": (["kl.target=0.1", "kl_weight=0"], "kl.target=0.1", "kl_weight=0"),
    "no target": (["kl.target=0"], "kl.target=0", "more than 0"),
    "a gradient in the reward": (
        ["kl.within=reward", "kl.unbiased_gradient=true"],
        "kl.unbiased_gradient=true",
        "kl.within=loss",
    ),
    "a sum without a place for the KL": (
        ["kl.within=reward", "algorithm.aggregate=statistics.mean"],
        "algorithm.aggregate=statistics.mean",
        "penalty_BG",
    ),
    "past the policy": (["kl.sync_share=1.5"], "kl.sync_share=1.5", "at most 1"),
    "nothing of the nucleus": (["sampling.top_p=0"], "sampling.top_p=0", "more than 0"),
    "more than the nucleus": (["sampling.top_p=1.5"], "sampling.top_p=1.5", "at most 1"),
    "negative top k": (["sampling.top_k=-1"], "sampling.top_k=-1", "at least 0"),
    "min p": (["sampling.min_p=2"], "sampling.min_p=2", "at most 1"),
    "no penalty": (["sampling.repetition_penalty=0"], "repetition_penalty=0", "more than 0"),
    "empty stop": (["sampling.stop=['']"], "sampling.stop", "empty"),
    "no vLLM": (["rollout=vllm"], "rollout=vllm: needs vllm", "grpo-bench[vllm]"),
    "no rank": (["adapter=lora", "adapter.rank=0"], "adapter.rank=0", "at least 1"),
    "no such modules": (
        ["adapter=lora", "adapter.target=[nowhere]"],
        "adapter.target=['nowhere']",
        "not found",
    ),
    "an adapter on the head": (
        ["adapter=lora", "adapter.target=[q_proj,lm_head]"],
        "adapter.target=['q_proj', 'lm_head']",
        "output layer",
    ),
    "unknown optimizer": (["optim.name=adam"], "optim.name=adam", "adamw"),
    "unknown order": (["curriculum.order=easy"], "curriculum.order=easy", "easy_first"),
    "an order that nothing tells": (
        ["curriculum.order=easy_first"],
        "curriculum.samples=0",
        "set curriculum.samples=4",
    ),
    "a difficulty that nothing tells": (
        ["curriculum.at_most=0.5"],
        "curriculum.samples=0",
        "set curriculum.samples=4",
    ),
    "shares the wrong way round": (
        ["curriculum.samples=2", "curriculum.at_least=0.9", "curriculum.at_most=0.1"],
        "curriculum.at_least=0.9",
        "lower one first",
    ),
    "nothing to evaluate": (
        ["eval.samples=0", "eval.greedy=false"],
        "eval.samples=0",
        "nothing to evaluate",
    ),
    "training without both evaluations": (["eval.samples=0"], "eval.samples=0", "grpo eval"),
    "a mix in order": (["dataset=mix", "curriculum.order=given"], "order=given", "shuffled"),
    "a mix of nothing": (
        [
            "dataset=mix",
            "dataset.sets.sums.probability=0",
            "dataset.sets.differences.probability=0",
        ],
        "dataset.sets",
        "above 0",
    ),
    "a negative share": (
        ["dataset=mix", "dataset.sets.sums.probability=-1"],
        "dataset.sets.sums.probability=-1",
        "at least 0",
    ),
    "a set that is none": (
        ["dataset=mix", "+dataset.sets.other.probability=1"],
        "dataset.sets.other",
        "defaults",
    ),
    "a wrong key in a set": (
        ["dataset=mix", "+dataset.sets.sums.digit=1"],
        "dataset.sets.sums.digit",
        "digits",
    ),
    "a reward for a set that is not there": (
        ["dataset=mix", "+reward.answer.sources=[products]"],
        "no set products",
        "sums, differences",
    ),
    "a reward for a set without a mix": (
        ["+reward.answer.sources=[sums]"],
        "reward.answer.sources",
        "not a mix",
    ),
    "a reward's own option": (
        ["reward=math", "reward.math.seconds=0"],
        "reward.math.seconds=0",
        "more than 0",
    ),
    "a reward model that is not there": (
        ["reward=reward_model", "reward.reward_model.model=./nowhere"],
        "reward.reward_model.model=./nowhere",
        "no model there",
    ),
    "an endpoint without an address": (
        ["reward=endpoint"],
        "reward.endpoint.url is not set",
        "url=",
    ),
    "an endpoint that is no address": (
        ["reward=endpoint", "reward.endpoint.url=localhost"],
        "reward.endpoint.url=localhost",
        "http",
    ),
    "a template option that is no mapping": (
        ["dataset.template_options=[1]"],
        "dataset.template_options=[1]",
        "Cannot merge DictConfig with ListConfig",
    ),
    "unknown objective": (["objective=eval/acuracy"], "objective=eval/acuracy", "eval/accuracy"),
    "unknown schedule": (["optim.schedule=cosin"], "optim.schedule=cosin", "cosine"),
    "two models": (["model.id=a/b"], "model", "exactly one"),
    "model unnamed": (["model=local"], "model=local", "model.path=FOLDER"),
    "checkpoint unnamed": (["eval"], "checkpoint is not set", "checkpoint="),
    "slice": (["dataset=gsm8k", "dataset.path=good.jsonl", "dataset.slice=:x%"], ":x%", ":5%"),
    "empty slice": (
        ["dataset=gsm8k", "dataset.path=good.jsonl", "dataset.slice=30:40"],
        "dataset.slice=30:40",
        "20 rows",
    ),
    "unknown task": (
        ["dataset=reasoning_gym", "dataset.task=chain_sums"],
        "dataset.task=chain_sums",
        "chain_sum",
    ),
    "no task": (["dataset=reasoning_gym"], "dataset.task is not set", "dataset.task="),
    "task option": (
        ["dataset=reasoning_gym", "dataset.task=chain_sum", "+dataset.options.min_trems=2"],
        "dataset.options",
        "min_trems",
    ),
    "unknown column": (
        ["dataset=jsonl", "dataset.path=good.jsonl", "dataset.answer_column=anwser"],
        "dataset.answer_column=anwser",
        "question, answer",
    ),
    "no such file": (["dataset=jsonl", "dataset.path=nope.jsonl"], "nope.jsonl", "no such file"),
    "no file named": (["dataset=jsonl"], "dataset.path is not set", ".jsonl"),
    "empty file": (["dataset=jsonl", "dataset.path=empty.jsonl"], "empty.jsonl", "no rows"),
    "not JSON": (["dataset=jsonl", "dataset.path=line17.jsonl"], "line17.jsonl", "line 17 is not"),
    "JSON, not rows": (["dataset=jsonl", "dataset.path=list.jsonl"], "list.jsonl", "line 1 is not"),
    "not UTF-8": (["dataset=jsonl", "dataset.path=latin.jsonl"], "latin.jsonl", "not UTF-8"),
    "a csv without such a column": (
        ["dataset=jsonl", "dataset.path=good.csv", "dataset.answer_column=gold"],
        "dataset.answer_column=gold",
        "question, answer",
    ),
    "a csv with a short line": (
        ["dataset=jsonl", "dataset.path=ragged.csv"],
        "ragged.csv: line 2 has 1 cells",
        "question, answer",
    ),
    "JSON, broken off": (["dataset=jsonl", "dataset.path=broken.json"], "broken.json", "line 2"),
    "a folder without such a split": (
        ["dataset=jsonl", "dataset.path=split", "dataset.split=dev"],
        "holds no split dev",
        "it has test, train",
    ),
    "a revision of no model of the hub": (
        ["model.revision=v2"],
        "model.revision=v2",
        "model.id=ORG/NAME",
    ),
    "code of a model that has none": (
        ["model.trust_remote_code=true"],
        "model.trust_remote_code=true",
        "leave it out",
    ),
    "a word for trust": (["model.trust_remote_code=maybe"], "model.trust_remote_code", "bool"),
    "not parquet": (["dataset=jsonl", "dataset.path=not.parquet"], "not.parquet", "not a parquet"),
    "another format": (["dataset=jsonl", "dataset.path=data.xls"], "data.xls", "use a .jsonl"),
    "without answers": (
        ["dataset=jsonl", "dataset.path=unanswered.jsonl", *WHOLE],
        "answer",
        "no such column",
    ),
    "blank answer": (
        ["dataset=jsonl", "dataset.path=blank.jsonl", *WHOLE],
        "row 1",
        "'answer'",
    ),
    "gsm8k without marks": (
        ["dataset=gsm8k", "dataset.path=unmarked.jsonl", *WHOLE],
        "row 1",
        "####",
    ),
    "too many problems": (["dataset.size=50000"], "dataset.size=50000", "digits"),
    "a word for a size": (["dataset.size=many"], "dataset.size=many", "should be int"),
    "a word for a flag": (["dataset.allow_overlap=maybe"], "allow_overlap=maybe", "bool"),
    "a bad worked example": (["dataset.worked_examples=[{q: 1}]"], "worked_examples", "answer"),
    "unknown split": (["dataset.split=dev"], "split=dev", "train and test"),
    "a horizon of less than a step": (
        ["kl.target=0.1", "kl.horizon=3"],
        "kl.horizon=3",
        "batch_size x num_generation = 16",
    ),
    "a gradient that k2 has": (
        ["kl=k2", "kl.unbiased_gradient=true"],
        "kl.unbiased_gradient=true",
        "k1 and k3",
    ),
    "a place for no KL": (["kl=none", "kl.within=reward"], "kl.within=reward", "no KL"),
    "agreeing groups that teach": (
        ["algorithm=reinforce_pp", "algorithm.resample=2"],
        "algorithm.resample=2",
        "batch_mean",
    ),
    "a gate without a slope": (
        ["algorithm=sapo", "algorithm.policy_loss.sharpness_positive=0"],
        "sharpness_positive=0",
        "more than 0",
    ),
    "a dual clip under the clip": (
        ["algorithm.policy_loss.clip_dual=1.1"],
        "clip_dual=1.1",
        "1.2",
    ),
    "a target that is a number": (
        ["adapter=lora", "adapter.target=5"],
        "adapter.target=5",
        "names of modules",
    ),
    "a key of the mix itself": (
        ["dataset=mix", "+dataset.max_prompt_tokens=5"],
        "dataset.max_prompt_tokens",
        "dataset.sets.NAME",
    ),
    "a probability without a mix": (["+dataset.probability=1"], "dataset.probability", "no such"),
    "a set without a probability": (
        ["dataset=mix", "~dataset.sets.sums.probability=0.5"],
        "dataset.sets.sums.probability",
        "not set",
    ),
    "a checkpoint that is a mistake": (
        ["eval", "checkpoint=runs/typo"],
        "checkpoint=runs/typo",
        "no such folder",
    ),
    "a word for a step": (["checkpoint.every=often"], "checkpoint.every=often", "number"),
    "a flag for a count": (["checkpoint.keep=true"], "checkpoint.keep=True", "whole number"),
    "a word for a budget": (["device.memory_gb=big"], "device.memory_gb", "'big'"),
    "no memory": (["device.memory_gb=0"], "device.memory_gb=0", "more than 0"),
    "less memory than it takes": (["device.memory_gb=0.1"], "device.memory_gb=0.1", "take 0."),
    "eval forgotten": (["checkpoint=some_run"], "checkpoint=some_run", "grpo eval"),
    "one beta": (["optim.betas=[0.9]"], "optim.betas=[0.9]", "two numbers"),
    "a word for a weight": (["reward.answer.weight=high"], "reward.answer.weight=high", "number"),
    "a weight that is nan": (["reward.answer.weight=nan"], "reward.answer.weight=nan", "number"),
    "a key added twice": (["+kl_weight=0.1"], "kl_weight", "leave out the +"),
    "a wrong interpolation": (["learning_rate=${model.lr}"], "model.lr", "not found"),
    "an id that is an address": (
        ["model=hub", "model.id=https://x.y/a/b"],
        "model.id=",
        "ORG/NAME",
    ),
    "broken weights": (["model=local", "model.path=broken"], "broken", "can't load"),
    "reward that needs more": (
        ["+reward.own._target_=collections.Counter", "+reward.own.weight=1", "+reward.own.x=y"],
        "reward.own",
        "called with a list of samples",
    ),
    "W&B without login": (["tracking=wandb", "tracking.wandb.mode=online"], "mode=online", "key"),
    "unknown extraction": (
        ["dataset.extract=tags"],
        "dataset.extract='tags'",
        "tag, boxed, number",
    ),
    "no folder": (["model=local", "model.path=nowhere"], "model.path=nowhere", "no model there"),
    "no weights": (
        ["model=local", "model.path=no_weights"],
        "model.path=no_weights",
        "safetensors",
    ),
    "reward that is not there": (
        ["+reward.mine._target_=my_rewards.fun", "+reward.mine.weight=1"],
        "reward.mine._target_=my_rewards.fun",
        "my_rewards",
    ),
    "reward with a weight that is nothing": (
        ["+reward.mine._target_=math.sqrt", "+reward.mine.weight=null"],
        "reward.mine.weight=None",
        "number",
    ),
    "reward without an option that it needs": (
        ["+reward.mine._target_=textwrap.indent"],
        "reward.mine",
        "needs `prefix`: add +reward.mine.prefix=…",
    ),
    "reward that is a class, without an option that it needs": (
        ["+reward.mine._target_=grpo.rewards.Endpoint"],
        "reward.mine",
        "needs `url`: add +reward.mine.url=…",
    ),
    "reward that is misspelled": (
        ["+reward.mine._target_=grpo.rewards.Endpont"],
        "reward.mine._target_=grpo.rewards.Endpont: can't be imported",
        "did you mean grpo.rewards.Endpoint?",
    ),
    "a key of nobody's, added": (["+kl_wieght=0.1"], "kl_wieght: no such key", "kl_weight"),
    "a key of nobody's, added to a part": (
        ["+optim.warmup=3"],
        "optim.warmup: no such key",
        "optim.warmup_steps",
    ),
    "another tool's name": (["beta=0.1"], "beta: here it is kl_weight", "kl_weight=0.1"),
    "another tool's name, added": (["+beta=0.1"], "beta: here it is kl_weight", "kl_weight=0.1"),
    "another tool's name, in its sections": (
        ["actor_rollout_ref.rollout.n=8"],
        "here it is num_generation",
        "num_generation=8",
    ),
    "a weight for the choice of a KL": (["kl=0"], "kl=0: no such choice", "kl_weight=0"),
    "a size for a model": (["model=1.5"], "model=1.5: no such choice", "qwen2_5_1_5b"),
    "a number of GPUs": (["parallel=4"], "parallel=4: no such choice", "hydra.launcher.n_jobs=4"),
    "no limit, as TRL has it": (["max_steps=-1"], "max_steps=-1", "write null"),
    "a path without its data set": (
        ["dataset.path=mine.jsonl"],
        "dataset.path: ",
        "add dataset=jsonl.",
    ),
    "a file for a data set": (
        ["dataset=mine.csv"],
        "dataset=mine.csv: no such choice",
        "dataset=jsonl dataset.path=mine.csv",
    ),
    "a hub id for a model": (
        ["model=Qwen/Qwen2.5-1.5B-Instruct"],
        "model=Qwen/Qwen2.5-1.5B-Instruct: no such choice",
        "model=hub model.id=Qwen/Qwen2.5-1.5B-Instruct.",
    ),
    "a part of files for a choice": (
        ["dataset=_bas"],
        "dataset=_bas: no such choice",
        "There are arithmetic, gsm8k",
    ),
    "several rewards without a list": (
        ["reward=answer,length"],
        "reward=answer,length: several values; add -m",
        "reward=[answer,length]",
    ),
    "several values without a sweep": (["kl_weight=0,0.1"], "kl_weight=0,0.1: several", "add -m"),
    "reward with an unknown option": (
        ["+reward.answer.tag=x"],
        "reward.answer.tag",
        "takes no such key",
    ),
    "reward named as a metric": (
        ["+reward.mean._target_=math.sqrt", "+reward.mean.weight=1"],
        "reward.mean",
        "taken",
    ),
    "too long for the model": (["max_new_tokens=5000"], "max_new_tokens=5000", "1024"),
    "prompts that don't fit": (
        ["dataset.max_prompt_tokens=3"],
        "dataset.max_prompt_tokens=3",
        "shortest",
    ),
    "no such device": (["device=cuda"], "device=cuda", "device=cpu"),
    "W&B mode": (["tracking=wandb", "tracking.wandb.mode=on"], "tracking.wandb.mode=on", "offline"),
    "folder that is a file": (["hydra.run.dir=a_file/run"], "hydra.run.dir=a_file/run", "written"),
    "resume from nowhere": (["resume=nowhere"], "resume=nowhere", "no such folder"),
    "resume from nothing": (["resume=no_weights"], "resume=no_weights", "no checkpoint"),
    "evaluate nothing": (["eval", "checkpoint=no_weights"], "checkpoint=no_weights", "no model"),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused_before_anything_starts(case: str, grpo: Grpo, tmp_path: Path) -> None:
    arguments, names, tells = CASES[case]
    write_files(tmp_path)
    job = [a for a in arguments if "=" not in a]
    base = [] if job else QUICK
    code, output = grpo(*job, *base, *[a for a in arguments if "=" in a])
    assert code == 2, output
    message = output.strip().splitlines()[-1]
    assert message.startswith("grpo: "), output
    assert names in message
    assert tells in message
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").glob("*/*/*"))


def test_a_real_process_says_it_in_one_line_and_exits_2(tmp_path: Path) -> None:
    result = run_grpo("num_generations=4", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    said = "grpo: num_generations: here it is num_generation; write num_generation=4.\n"
    assert result.stderr == said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["hydra/launcher=slrum", "-m", "seed=0,1"],
            "hydra/launcher=slrum: no such choice; did you mean slurm?",
        ),
        (["--multirn", "seed=0,1"], "--multirn: no such flag; did you mean --multirun?"),
        (["--cfg", "jobs"], "--cfg/-c: invalid choice: 'jobs'"),
    ],
)
def test_flags_stand_anywhere_and_wrong_ones_are_told_in_a_line(
    arguments: list[str], says: str, grpo: Grpo
) -> None:
    code, output = grpo(*arguments)
    assert code == 2
    assert output.startswith(f"grpo: {says}")
    assert len(output.splitlines()) == 1


def test_a_number_from_the_environment_is_one(tmp_path: Path) -> None:
    done = run_grpo(
        "seed=${oc.env:SEED}", "learning_rate=${oc.env:RATE}", "--cfg", "job", "--resolve",
        cwd=tmp_path, env={"SEED": "7", "RATE": "1e-3"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\nseed: 7\n" in done.stdout
    refused = run_grpo("seed=${oc.env:SEED}", cwd=tmp_path, env={"SEED": "seven"})
    assert refused.returncode == 2
    assert "seed" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_job_explains_itself(tmp_path: Path) -> None:
    for job in ("report", "dashboard", "chat", "export"):
        done = run_grpo(job, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert done.stdout.startswith(f"grpo {job} ")
    assert run_grpo("--version", cwd=tmp_path).stdout.startswith("grpo-bench 0.")


def test_who_stops_reading_gets_no_traceback(tmp_path: Path) -> None:
    program = f"{sys.executable} -m grpo --help | head -1"
    done = subprocess.run(program, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("grpo: train")
    assert done.stderr == ""


def test_help_config_and_refusals_import_nothing_heavy(tmp_path: Path) -> None:
    """What makes them quick: torch, transformers, datasets and wandb are never imported."""
    program = (
        "import sys; from grpo.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'wandb', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (
        ["--help"],
        ["--cfg", "job"],
        ["--info", "defaults-tree"],
        ["-sc", "install=bash"],
        ["kl_wieght=1"],
        ["batch_size=0"],
        ["algorithm.baseline=group_men"],
        ["kl.estimator=k4"],
        ["chat", "nowhere"],
        ["export", "nowhere", "folder"],
    ):
        result = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("asked", "missing", "instead"),
    [
        ("model=qwen2_0_5b", "model=qwen2_0_5b: Qwen/Qwen2-0.5B-Instruct", "model=tiny"),
        ("dataset=gsm8k", "dataset: openai/gsm8k", "dataset.path="),
    ],
)
def test_a_hub_that_cannot_be_reached_is_told_within_seconds(
    asked: str, missing: str, instead: str, tmp_path: Path
) -> None:
    """A closed port on this machine stands for the hub."""
    started = time.monotonic()
    message = run_refused_with_hub("http://127.0.0.1:9", tmp_path, asked, "tracking=none", RUN)
    assert f"{missing} is not in the local cache and the hub can't be reached" in message
    assert instead in message
    assert time.monotonic() - started < 60  # where it hangs instead, that is minutes
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("model=hub", "model.id=no/body", "tracking=none", RUN), "no/body is not in the local"),
        (
            ("eval", "checkpoint=no/body"),
            "checkpoint=no/body: there is no such folder; as a",
        ),
    ],
)
def test_what_the_hub_does_not_have_is_told(
    arguments: tuple[str, ...], names: str, tmp_path: Path
) -> None:
    """A server that has nothing stands for the hub."""
    nothing = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), nothing) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        message = run_refused_with_hub(f"http://127.0.0.1:{hub.server_port}", tmp_path, *arguments)
        hub.shutdown()
    assert names in message
    assert "404" in message
    assert not (tmp_path / "run/metrics.jsonl").exists()


def run_refused_with_hub(endpoint: str, cwd: Path, *arguments: str) -> str:
    """The last line of a command that is refused, where the hub has this address."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cwd / "cache")}
    environment.pop("HF_HUB_OFFLINE", None)
    result = subprocess.run(
        [sys.executable, "-m", "grpo", *arguments],
        cwd=cwd, capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


REWARDS = """
def raises(samples):
    if any("5" in sample.completion for sample in samples):
        raise ValueError("no fives, please")
    return [0.0] * len(samples)

def nan(samples):
    return [float("nan")] * len(samples)

def short(samples):
    return [0.0]
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [("raises", "no fives, please"), ("nan", "nan"), ("short", "1 values for 128 completions")],
)
def test_a_reward_that_fails_stops_the_run_after_saving(
    name: str, says: str, grpo: Grpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = [f"+reward.own._target_=own_rewards.{name}", "+reward.own.weight=1.0"]
    code, output = grpo(*QUICK, *reward)
    assert code == 1, output
    assert "Traceback" not in output
    assert "reward.own" in output
    assert says in output
    assert "prompt:" in output
    assert "completion:" in output
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "failed"
    assert says in summary["error"]
    assert (tmp_path / "run/checkpoints/latest/model/model.safetensors").is_file()


def test_a_choice_of_ones_own_in_conf_is_pointed_out(grpo: Grpo, tmp_path: Path) -> None:
    (tmp_path / "conf/reward").mkdir(parents=True)
    (tmp_path / "conf/reward/short.yaml").write_text("short: {_target_: grpo.rewards.answer}\n")
    code, printed = grpo("reward=short")
    assert code == 2
    assert (
        "reward=short: no such choice; for conf/reward/short.yaml add --config-dir conf." in printed
    )
