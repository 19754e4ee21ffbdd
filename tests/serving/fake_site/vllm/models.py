"""The stock classes."""


class LagunaForCausalLM:
    pass


class DFlashLagunaForCausalLM:
    pass


class DFlashDraftModel:
    pass
