"""`subquad completion`: a script that completes commands, options and their values in bash and zsh."""

from argparse import Action, Namespace
from collections.abc import Iterator

from subquad.cli.parser import Parser

USAGE = """Print a script for bash or zsh that completes commands, options and their values. For one shell:
eval "$(subquad completion)"; for all, append the script to ~/.bashrc, or to ~/.zshrc below compinit."""
SCRIPT = """\
[ -n "$ZSH_VERSION" ] && autoload -U +X bashcompinit && bashcompinit
_subquad() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "$command ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
      *) case "$command:$word" in
{options}
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _subquad subquad"""


def add_commands(parser: Parser) -> None:
    def run_completion(args: Namespace) -> None:
        print(script(parser))

    command = parser.command("completion", run_completion, "Print a script that completes commands in bash and zsh.")
    command.description = " ".join(USAGE.split())


def script(parser: Parser) -> str:
    """Where nothing matches, as after an option without choices, the shell completes file names."""
    values, options = [], []
    for name, command in parser.commands.choices.items():
        for action in actions(command):
            places = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
            words = action.choices or getattr(action, "words", ())
            values += [f'      {places}) words="{" ".join(words)}" ;;'] if words else []
        flags = " ".join(flag for action in actions(command) for flag in action.option_strings)
        options.append(f'        {name}:-*) words="{flags}" ;;')
    return SCRIPT.format(
        commands=" ".join(parser.commands.choices), values="\n".join(values), options="\n".join(options)
    )


def actions(command: Parser) -> Iterator[Action]:
    """The options of a command."""
    return (action for action in command._actions if action.option_strings)
