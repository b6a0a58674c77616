# shellcheck shell=bash
# Sourced by the scripts beside it: messages, help, and commands that --dry-run prints instead of running.

dry_run=0

say() { printf '%s\n' "$*" >&2; }
stop() {
  say "jaxrm: $*"
  exit 2
}

# show_help SCRIPT: the comment that opens it.
show_help() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$1"; }

# quote_words WORD...: one line that bash reads as these very words, here or at the other end of ssh.
quote_words() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# run COMMAND...: runs it, or in a dry run prints it.
run() {
  if [ "$dry_run" = 1 ]; then
    quote_words "$@"
  else
    "$@"
  fi
}

# run_last COMMAND...: the same in place of this script, so that signals reach it and its exit status is ours.
run_last() {
  [ "$dry_run" = 1 ] || exec "$@"
  quote_words "$@"
}

# need TOOL HOW: stops where TOOL is not there, saying how to get it. A dry run does without it.
need() { [ "$dry_run" = 1 ] || command -v "$1" >/dev/null || stop "'$1' is not on PATH; $2"; }

# whole_number OPTION VALUE
whole_number() { [[ $2 =~ ^[0-9]{1,6}$ ]] || stop "$1 is '$2'; use a whole number, e.g. $1=10"; }
