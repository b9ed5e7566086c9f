"""Which circuits of a language model does finetuning strengthen?"""
