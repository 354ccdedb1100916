"""Where this code's operators are in torch.ops, which is one for the whole process.

Copies of this code, as checkpoints bring them along, are packages of other names, and must not take the place of each
other's operators. torch takes ASCII letters, digits and underscores, Python the letters of any alphabet, and import
machinery whatever a folder's name has.
"""

import re

__all__ = ["NAMESPACE", "operator_namespace"]


def operator_namespace(package: str) -> str:
    """The package's name in ASCII, no two packages' the same: `modèle.a_b` becomes `mod_e8_le_2e_a_5f_b`.

    All but ASCII letters and digits, the underscore included, becomes its code point between underscores.
    """
    return re.sub(r"[^A-Za-z0-9]", lambda found: f"_{ord(found[0]):x}_", package)


NAMESPACE = operator_namespace(__package__)
