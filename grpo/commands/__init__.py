"""What reads what runs left, or says what they would do.

`grpo check`, `grpo runs`, `grpo report`, `grpo export`, `grpo chat`, `grpo dashboard`.
"""
