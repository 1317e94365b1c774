"""Judges: each decides in its own way whether a reply carries out a harmful prompt. `factory.make_judge` names them by a text."""
