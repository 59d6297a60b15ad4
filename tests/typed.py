"""What users type, which must arrive in the workers as it was typed."""

from __future__ import annotations

from hypothesis import strategies as st

# No argument of a process can hold a NUL; surrogates but these are no text.
_texts = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"])
)
_NASTY = (
    "$(touch canary)",
    "$(HOME) $$(HOME) $HOME ${HOME}",
    "`touch canary`",
    "'; touch canary; '",
    '"; touch canary; "',
    "\n#SBATCH --begin=tomorrow\n",
    "\n  touch canary\nsetup: touch canary",
    "\\",
    "!!",
    "100% %24",
    "~ * ? [a]",
    "gr\u00f6\u00dfe \u753b\u50cf \U0001f600",
    "\u0007\u007f\u0085\u2028\ufeff",
    # A name of a file that is no UTF-8, as Python hands it on.
    "\udcff",
)
# None of them is left to chance.
ALL = " ".join(_NASTY)
words = _texts | st.sampled_from(_NASTY)
