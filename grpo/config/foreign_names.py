"""The keys of TRL, verl and OpenRLHF that have another name in this project.

Sources: TRL's GRPOConfig and ModelConfig, verl's ppo_trainer.yaml, OpenRLHF's train_ppo_ray.py.
OpenRLHF's keys are listed with the sections that they have since 0.10.2, and without. Some keys of
older versions are listed, too. A key with the same name here, such as temperature, is not.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from grpo.errors import ConfigError


class Equivalent(NamedTuple):
    """What a foreign key is called in this project."""

    key: str  # or a group
    note: str = ""  # where the value can't simply be taken over: what differs
    override: str = ""  # to write, where it is more than `key=VALUE`; {} stands for the value


CLIP = "its counterpart upwards is algorithm.policy_loss.clip_high"
MICROBATCHES = "tokens, not sequences; left out, it follows from the memory there is"
KL_NAMES = "verl's kl is k1, mse k2, low_var_kl k3; also full or none"
ESTIMATORS = (
    "grpo (OpenRLHF's group_norm), dr_grpo, rloo, gpg, reinforce_pp (verl's reinforce_plus_plus, "
    "OpenRLHF's reinforce)"
)
MINIBATCHES = "how many a step is divided into, not how large each is"
PROMPTS = "prompts a step, not completions"
REDRAWS = "how often at most a step draws anew"
CAP = "the upper bound alone"
MODES = "truncate or mask; sequence_… is algorithm.importance_level=sequence_product"
SOFT_OVERLONG = Equivalent("reward", override="reward=[answer,soft_overlong]")
OWN_REWARD = Equivalent("reward", "+reward.NAME._target_=my_module.my_function")
REWARD_MODEL = Equivalent(
    "reward.reward_model.model", override="reward=reward_model reward.reward_model.model={}"
)

FOREIGN_NAMES: dict[str, Equivalent] = {
    # the KL to the reference
    "beta": Equivalent("kl_weight"),
    "kl_beta": Equivalent("kl_weight"),
    "kl_coef": Equivalent("kl_weight"),
    "init_kl_coef": Equivalent("kl_weight"),
    "kl_loss_coef": Equivalent("kl_weight"),
    "kl.init_coef": Equivalent("kl_weight"),
    "use_kl_loss": Equivalent("kl.within", override="kl.within=loss"),
    "kl.use_loss": Equivalent("kl.within", override="kl.within=loss"),
    "use_kl_in_reward": Equivalent("kl.within", override="kl.within=reward"),
    "kl_loss_type": Equivalent("kl", KL_NAMES),
    "kl_penalty": Equivalent("kl", KL_NAMES),
    "kl_estimator": Equivalent("kl", KL_NAMES),
    "algo.kl.estimator": Equivalent("kl", KL_NAMES),
    "target_kl": Equivalent("kl.target"),
    "kl_target": Equivalent("kl.target"),
    "algo.kl.target": Equivalent("kl.target"),
    "kl_horizon": Equivalent("kl.horizon"),
    "kl_ctrl.horizon": Equivalent("kl.horizon"),
    "algo.kl.horizon": Equivalent("kl.horizon"),
    "sync_ref_model": Equivalent("kl.sync_every", "a number of steps; 0 never moves it"),
    "ref_model_sync_steps": Equivalent("kl.sync_every"),
    "ref_model_mixup_alpha": Equivalent("kl.sync_share"),
    # the loss
    "epsilon": Equivalent("algorithm.policy_loss.clip_low", CLIP),
    "clip_ratio": Equivalent("algorithm.policy_loss.clip_low", CLIP),
    "clip_ratio_low": Equivalent("algorithm.policy_loss.clip_low"),
    "eps_clip": Equivalent("algorithm.policy_loss.clip_low", CLIP),
    "eps_clip_low_high": Equivalent("algorithm.policy_loss.clip_low", CLIP),
    "epsilon_high": Equivalent("algorithm.policy_loss.clip_high"),
    "clip_ratio_high": Equivalent("algorithm.policy_loss.clip_high"),
    "delta": Equivalent("algorithm.policy_loss.clip_dual"),
    "clip_ratio_c": Equivalent("algorithm.policy_loss.clip_dual"),
    "dual_clip": Equivalent("algorithm.policy_loss.clip_dual"),
    "loss_type": Equivalent("algorithm"),
    "adv_estimator": Equivalent("algorithm", ESTIMATORS),
    "advantage_estimator": Equivalent("algorithm", ESTIMATORS),
    "advantage.estimator": Equivalent("algorithm", ESTIMATORS),
    "loss_mode": Equivalent("algorithm", "gspo, cispo, sapo and gpg have the same name here"),
    "policy_loss_type": Equivalent("algorithm", "gspo has the same name here; ppo is grpo's loss"),
    "loss_agg_mode": Equivalent(
        "algorithm.averaging", "sequence_mean, token_mean, sequence_sum or constant"
    ),
    "importance_sampling_level": Equivalent("algorithm.ratio", "token or sequence"),
    "scale_rewards": Equivalent("algorithm.scale", "group_std, batch_std or none"),
    "norm_adv_by_std_in_grpo": Equivalent("algorithm.scale", "group_std or none"),
    "no_advantage_std_norm": Equivalent("algorithm.scale", override="algorithm.scale=none"),
    "no_std_norm": Equivalent("algorithm.scale", override="algorithm.scale=none"),
    "mask_truncated_completions": Equivalent("algorithm.mask_truncated"),
    "top_entropy_quantile": Equivalent("algorithm.top_entropy"),
    "entropy_coeff": Equivalent("algorithm.entropy_weight"),
    "entropy_coef": Equivalent("algorithm.entropy_weight"),
    "entropy_loss_coef": Equivalent("algorithm.entropy_weight"),
    "num_iterations": Equivalent("algorithm.num_iterations"),
    "ppo_epochs": Equivalent("algorithm.num_iterations"),
    "max_epochs": Equivalent("algorithm.num_iterations"),
    "vllm_importance_sampling_cap": Equivalent("algorithm.importance_cap"),
    "vllm_importance_sampling_clip_max": Equivalent("algorithm.importance_cap"),
    "vllm_importance_sampling_clip_min": Equivalent("algorithm.importance_floor"),
    "vllm_importance_sampling_mode": Equivalent("algorithm.importance_outside", MODES),
    "off_policy_mask_threshold": Equivalent("algorithm.max_sequence_kl"),
    "rollout_is": Equivalent("algorithm.importance_level", "token or sequence_product"),
    "rollout_is_threshold": Equivalent("algorithm.importance_cap"),
    "vllm_is_truncated_threshold": Equivalent("algorithm.importance_cap", CAP),
    "is_correction_threshold": Equivalent("algorithm.importance_cap", CAP),
    "steps_per_generation": Equivalent("algorithm.minibatches"),
    "ppo_mini_batch_size": Equivalent("algorithm.minibatches", MINIBATCHES),
    "train.batch_size": Equivalent("algorithm.minibatches", MINIBATCHES),
    "dynamic_filtering": Equivalent("algorithm.resample", REDRAWS),
    "filter_groups": Equivalent("algorithm.resample", REDRAWS),
    "filter_groups.enable": Equivalent("algorithm.resample", REDRAWS),
    "max_num_gen_batches": Equivalent("algorithm.resample", REDRAWS),
    "dynamic_filtering_enable": Equivalent("algorithm.resample", REDRAWS),
    # sizes and lengths
    "num_generations": Equivalent("num_generation"),
    "n_samples_per_prompt": Equivalent("num_generation"),
    "rollout.n": Equivalent("num_generation"),
    "group_size": Equivalent("num_generation"),
    "per_device_train_batch_size": Equivalent("batch_size", PROMPTS),
    "generation_batch_size": Equivalent("batch_size", PROMPTS),
    "train_batch_size": Equivalent(
        "batch_size", "prompts a step; OpenRLHF's is completions an update: algorithm.minibatches"
    ),
    "rollout_batch_size": Equivalent("batch_size", PROMPTS),
    "rollout.batch_size": Equivalent("batch_size", PROMPTS),
    "gradient_accumulation_steps": Equivalent("device.token_budget", MICROBATCHES),
    "micro_train_batch_size": Equivalent("device.token_budget", MICROBATCHES),
    "train.micro_batch_size": Equivalent("device.token_budget", MICROBATCHES),
    "ppo_micro_batch_size_per_gpu": Equivalent("device.token_budget", MICROBATCHES),
    "ppo_max_token_len_per_gpu": Equivalent("device.token_budget"),
    "train_max_tokens_per_gpu": Equivalent("device.token_budget"),
    "train.max_tokens_per_gpu": Equivalent("device.token_budget"),
    "max_completion_length": Equivalent("max_new_tokens"),
    "max_response_length": Equivalent("max_new_tokens"),
    "generate_max_len": Equivalent("max_new_tokens"),
    "rollout.max_new_tokens": Equivalent("max_new_tokens"),
    "max_tokens": Equivalent("max_new_tokens"),
    "max_prompt_length": Equivalent("dataset.max_prompt_tokens"),
    "prompt_max_len": Equivalent("dataset.max_prompt_tokens"),
    "num_train_epochs": Equivalent("num_epochs"),
    "total_epochs": Equivalent("num_epochs"),
    "num_episodes": Equivalent("num_epochs"),
    "epochs": Equivalent("num_epochs"),
    "total_training_steps": Equivalent("max_steps"),
    "rollout.temperature": Equivalent("temperature"),
    "top_p": Equivalent("sampling.top_p"),
    "top_k": Equivalent("sampling.top_k"),
    "min_p": Equivalent("sampling.min_p"),
    "repetition_penalty": Equivalent("sampling.repetition_penalty"),
    # the optimizer
    "lr": Equivalent("learning_rate"),
    "optim.lr": Equivalent("learning_rate"),
    "actor_learning_rate": Equivalent("learning_rate"),
    "lr_scheduler_type": Equivalent("optim.schedule"),
    "lr_scheduler": Equivalent("optim.schedule"),
    "warmup_steps": Equivalent("optim.warmup_steps"),
    "lr_warmup_steps": Equivalent("optim.warmup_steps"),
    "warmup_ratio": Equivalent("optim.warmup_steps", "a number of updates, not a share"),
    "lr_warmup_ratio": Equivalent("optim.warmup_steps", "a number of updates, not a share"),
    "lr_warmup_steps_ratio": Equivalent("optim.warmup_steps", "a number of updates, not a share"),
    "weight_decay": Equivalent("optim.weight_decay"),
    "l2": Equivalent("optim.weight_decay"),
    "adam_beta1": Equivalent("optim.betas", "both in a list: [0.9,0.99]"),
    "adam_beta2": Equivalent("optim.betas", "both in a list: [0.9,0.99]"),
    "adam_betas": Equivalent("optim.betas"),
    "adam.betas": Equivalent("optim.betas"),
    "actor.optim.betas": Equivalent("optim.betas"),
    "max_grad_norm": Equivalent("optim.max_grad_norm"),
    "grad_clip": Equivalent("optim.max_grad_norm"),
    "clip_grad": Equivalent("optim.max_grad_norm"),
    "max_norm": Equivalent("optim.max_grad_norm"),
    # model, data, reward
    "model_name": Equivalent("model.id", override="model=hub model.id={}"),
    "model_name_or_path": Equivalent("model.id", override="model=hub model.id={}"),
    "actor_rollout_ref.model.path": Equivalent("model.id", override="model=hub model.id={}"),
    "pretrain": Equivalent("model.id", override="model=hub model.id={}"),
    "model_revision": Equivalent("model.revision"),
    "trust_remote_code": Equivalent("model.trust_remote_code"),
    "peft_config": Equivalent("adapter", "none, lora or qlora"),
    "use_peft": Equivalent("adapter", override="adapter=lora"),
    "load_in_4bit": Equivalent("adapter", override="adapter=qlora"),
    "lora_r": Equivalent("adapter.rank", override="adapter=lora adapter.rank={}"),
    "lora_rank": Equivalent("adapter.rank", override="adapter=lora adapter.rank={}"),
    "lora.rank": Equivalent("adapter.rank", override="adapter=lora adapter.rank={}"),
    "lora.alpha": Equivalent("adapter.alpha", override="adapter=lora adapter.alpha={}"),
    "lora_alpha": Equivalent("adapter.alpha", override="adapter=lora adapter.alpha={}"),
    "lora_target_modules": Equivalent("adapter.target", override="adapter=lora adapter.target={}"),
    "target_modules": Equivalent("adapter.target", override="adapter=lora adapter.target={}"),
    "dataset_name": Equivalent("dataset.id", override="dataset=hub dataset.id={}"),
    "prompt_data": Equivalent("dataset.id", override="dataset=hub dataset.id={}"),
    "prompt_dataset": Equivalent("dataset.id", override="dataset=hub dataset.id={}"),
    "prompt_split": Equivalent("dataset.split"),
    "dataset_train_split": Equivalent("dataset.split"),
    "dataset_test_split": Equivalent("dataset.eval_split"),
    "train_files": Equivalent("dataset.path", override="dataset=jsonl dataset.path={}"),
    "input_key": Equivalent("dataset.question_column"),
    "prompt_key": Equivalent("dataset.question_column"),
    "label_key": Equivalent("dataset.answer_column"),
    "reward_funcs": Equivalent("reward", "several: reward=[answer,length]"),
    "reward_weights": Equivalent("reward.NAME.weight", "one for each reward"),
    "overlong_buffer": SOFT_OVERLONG,
    "overlong_buffer.enable": SOFT_OVERLONG,
    "overlong_buffer.len": SOFT_OVERLONG,
    "overlong_buffer_cfg.enable": SOFT_OVERLONG,
    "overlong_buffer_cfg.len": SOFT_OVERLONG,
    "overlong_buffer_len": SOFT_OVERLONG,
    "custom_reward_function": OWN_REWARD,
    "custom_reward_function.path": OWN_REWARD,
    "custom_reward_function.name": OWN_REWARD,
    "remote_rm_url": Equivalent("reward", override="reward=endpoint reward.endpoint.url={}"),
    "remote_url": Equivalent("reward", override="reward=endpoint reward.endpoint.url={}"),
    "reward_model_name_or_path": REWARD_MODEL,
    "reward.model_name_or_path": REWARD_MODEL,
    "reward_pretrain": REWARD_MODEL,
    "reward_model.model.path": REWARD_MODEL,
    "reward_model.model_path": REWARD_MODEL,
    # the run
    "rollout.name": Equivalent("rollout", "native, hf or vllm"),
    "use_vllm": Equivalent("rollout", override="rollout=vllm"),
    "bf16": Equivalent("device.precision", override="device.precision=bf16"),
    "fp16": Equivalent("device.precision", "bf16 or fp32; fp16 does not train well"),
    "param_dtype": Equivalent("device.precision", "bf16 or fp32; fp16 does not train well"),
    "gradient_checkpointing": Equivalent("device.gradient_checkpointing"),
    "gradient_checkpointing_enable": Equivalent("device.gradient_checkpointing"),
    "enable_gradient_checkpointing": Equivalent("device.gradient_checkpointing"),
    "output_dir": Equivalent("hydra.run.dir"),
    "save_path": Equivalent("hydra.run.dir"),
    "default_local_dir": Equivalent("hydra.run.dir"),
    "run_name": Equivalent("name"),
    "experiment_name": Equivalent("name"),
    "wandb_run_name": Equivalent("name"),
    "report_to": Equivalent("tracking"),
    "trainer.logger": Equivalent("tracking", "wandb, trackio or none"),
    "use_wandb": Equivalent("tracking", override="tracking=wandb"),
    "project_name": Equivalent("tracking.wandb.project"),
    "wandb_project": Equivalent("tracking.wandb.project"),
    "wandb.project": Equivalent("tracking.wandb.project"),
    "save_steps": Equivalent("checkpoint.every"),
    "save_freq": Equivalent("checkpoint.every"),
    "save_total_limit": Equivalent("checkpoint.keep"),
    "max_ckpt_num": Equivalent("checkpoint.keep"),
    "ckpt.max_num": Equivalent("checkpoint.keep"),
    "max_actor_ckpt_to_keep": Equivalent("checkpoint.keep"),
    "eval_steps": Equivalent("eval.every"),
    "eval.steps": Equivalent("eval.every"),
    "test_freq": Equivalent("eval.every"),
    "log_completions": Equivalent("log_prompts", "how many prompts a step; 0 for none"),
    "resume_from_checkpoint": Equivalent("resume", "a run's folder, or auto"),
    "resume_mode": Equivalent("resume", "a run's folder, or auto"),
    "resume_from_path": Equivalent("resume", "a run's folder, or auto"),
    "load_checkpoint": Equivalent("resume", "a run's folder, or auto"),
    "ckpt.load_enable": Equivalent("resume", "a run's folder, or auto"),
}


def find_equivalent(key: str) -> Equivalent | None:
    """Returns this project's name for a foreign key; sections before it are ignored."""
    parts = key.split(".")
    for first in range(len(parts)):
        if found := FOREIGN_NAMES.get(".".join(parts[first:])):
            return found
    return None


def explain_foreign_name(key: str, value: str) -> ConfigError | None:
    """Says what a foreign key is called in this project; None if no other tool has it.

    Args:
        value: the value that it was given, as written.
    """
    found = find_equivalent(key)
    if found is None or found.key == key:
        return None
    if found.override:
        remedy = f"; write {found.override.format(value or '…')}"
    elif found.note:
        remedy = f" ({found.note})"
    else:
        plain = re.fullmatch(r"[\w.+/:~-]+", value)
        remedy = f"; write {found.key}={value}" if plain else ""
    return ConfigError(
        f"{key}: here it is {found.key}{remedy}.", key=key, value=value, nearest=[found.key]
    )
