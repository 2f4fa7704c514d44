"""Llama: every layer may use MoBA."""

from family_contract import FamilyContract


class TestLlama(FamilyContract):
    model_type = "llama"
