from ha_core.cli.main import main

main()
