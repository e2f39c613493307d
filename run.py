"""Pre-trains a language model with many emulated miners.

python run.py --config=configs/shakespeare.py
python run.py --config=configs/shakespeare.py:smoke --config.rounds=10
"""

from covenant import __main__ as main_lib

if __name__ == '__main__':
  main_lib.main()
