"""`python -m keras_edifice` is the command `keras-edifice`."""

from keras_edifice.cli import main

main()
