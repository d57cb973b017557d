"""Tab completion: a shell script of all commands and flags, made from the flags themselves."""

import importlib
from collections.abc import Iterable

from kmq_jax.cli.config_flags import BOTH, FLAGS, configurations
from kmq_jax.core.errors import UserError

# It splits COMP_LINE itself: bash breaks COMP_WORDS at "=", which our flags contain. Braces are doubled for `format`.
BASH = """_kmq_jax() {{
  local line=${{COMP_LINE:0:COMP_POINT}} words
  local current=${{line##* }}
  read -ra words <<< "$line"
  if (( ${{#words[@]}} < 2 )) || [[ ${{#words[@]}} -eq 2 && $line != *" " ]]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$current"))
    return
  fi
  local flags=""
  case ${{words[1]}} in
{cases}
  esac
  case $current in
    --*=*) COMPREPLY=($(compgen -W "$flags" -- "$current"))
      (( ${{#COMPREPLY[@]}} )) || COMPREPLY=($(compgen -f -- "${{current#*=}}"))
      COMPREPLY=("${{COMPREPLY[@]#"${{current%%=*}}="}}") ;;
    *) COMPREPLY=($(compgen -W "$flags" -- "$current"))
      [[ ${{COMPREPLY-}} == *= ]] && compopt -o nospace ;;
  esac
}}
complete -o default -F _kmq_jax kmq-jax"""


def script(shell: str, commands: Iterable[str]) -> str:
    """The script that teaches a shell to complete `kmq-jax`.

    Args:
        shell: "bash".
        commands: names of all commands.

    Raises:
        UserError: the shell is another.
    """
    if shell != "bash":
        raise UserError(f"--completion (={shell}) must be bash")
    cases = [f'    {name}) flags="{" ".join(flags_of(name))}" ;;' for name in commands]
    return BASH.format(commands=" ".join(commands), cases="\n".join(cases))


def flags_of(name: str) -> list[str]:
    """The words that may follow a command: flags, with "=" where a value follows, and values that are choices.

    >>> flags_of("speakers")
    ['--help', '--store=', '--remove=']
    """
    if name in FLAGS:
        return [*BOTH, *FLAGS[name], *(f"--config={known}" for known in configurations())]
    module = importlib.import_module(f"kmq_jax.cli.{name}")
    if name == "bench":
        return list(module.benchmarks())
    words = ["--help"]
    for action in module.COMMAND.parser()._actions[1:]:  # the first is --help
        if not action.option_strings:
            continue  # a file, which the shell completes
        flag, listed = action.option_strings[-1], str(action.metavar or "")
        # A switch takes no value: its `nargs` is 0.
        words.append(flag if action.nargs == 0 else f"{flag}=")
        if listed.startswith("{"):  # `add_flags` lists choices as {one,two}
            words += [f"{flag}={choice}" for choice in listed.strip("{}").split(",")]
    return words
