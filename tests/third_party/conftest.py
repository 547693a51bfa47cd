"""The packages' own tests are run where the packages are installed, by ``tests/test_third_party.py``."""

collect_ignore_glob = ["*/tests/*"]
