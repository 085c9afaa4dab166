"""What reads what runs left: `grpo report`, `grpo export`, `grpo chat`, `grpo dashboard`."""
