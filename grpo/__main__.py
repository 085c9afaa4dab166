from grpo.cli.main import main

main()
