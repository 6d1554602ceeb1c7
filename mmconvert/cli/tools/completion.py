"""The command ``completion``: a script that lets the shell complete mm-convert's words."""

from __future__ import annotations

from mmconvert.cli.commands import AUTO, MS_VERBS, TOOLS, VERBS
from mmconvert.converters import MINDSPORE, converter_names
from mmconvert.errors import RequestError

USAGE = """usage: mm-convert completion {bash,zsh}

Prints a script that completes converters, verbs, tools, flags and paths. To use it:

  eval "$(mm-convert completion bash)"     in ~/.bashrc
  eval "$(mm-convert completion zsh)"      in ~/.zshrc"""

# The flags of a command are asked from its own help, so that they are never out of date.
BASH = """_mm_convert() {
    local current="${COMP_WORDS[COMP_CWORD]}" first="${COMP_WORDS[1]}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="@first@"
    elif [ "$COMP_CWORD" -eq 2 ] && [[ " @converters@ " == *" $first "* ]]; then
        words="@verbs@"
        if [[ " @ms@ " == *" $first "* ]]; then
            words="@ms_verbs@"
        fi
    elif [[ "$current" == -* ]]; then
        if [[ " @converters@ " == *" $first "* ]]; then
            words="$(mm-convert "$first" "${COMP_WORDS[2]}" -h 2>/dev/null)"
        else
            words="$(mm-convert "$first" -h 2>/dev/null)"
        fi
        words="$(printf '%s\\n' "$words" | grep -oE -- '--[a-z][a-z_.]*' | sort -u)"
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [ -z "$words" ]; then
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}
complete -o filenames -o bashdefault -F _mm_convert mm-convert
"""
SCRIPTS = {"bash": BASH, "zsh": "autoload -U +X bashcompinit && bashcompinit\n" + BASH}


def run(words: list[str]) -> int:
    """Prints the script."""
    if words in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(words) != 1 or words[0] not in SCRIPTS:
        raise RequestError(
            f"there is no completion for {' '.join(words)}" if words else "no shell is named",
            "bash or zsh",
        )
    converters = [AUTO, *converter_names(), *MINDSPORE]
    script = SCRIPTS[words[0]]
    for mark, listed in (
        ("first", [*converters, *TOOLS]),
        ("converters", converters),
        ("verbs", VERBS),
        ("ms", MINDSPORE),
        ("ms_verbs", MS_VERBS),
    ):
        script = script.replace(f"@{mark}@", " ".join(listed))
    print(script, end="")
    return 0
