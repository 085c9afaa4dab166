from grpo.cli import main

main()
