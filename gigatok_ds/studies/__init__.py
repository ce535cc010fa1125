"""Experiments of several commands: published rows reproduced, guidance searched, tokenizers judged by the GPTs they
feed.
"""
