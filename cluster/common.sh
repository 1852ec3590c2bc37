# Shared by the scripts of this folder; sourced, never run.

cluster_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo_dir=$(dirname "$cluster_dir")
data_dir=${CLUSTER_DATA:-$cluster_dir/data}
run_dir=$data_dir/run
nodes=(node1 node2 node3)

say() { printf '%s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 1
}

# When a process started, in the kernel's ticks: with its id it names one process for ever, while the id alone
# may be given to another one later.
started_at() { # started_at PID
    local stat
    { read -r -d '' stat <"/proc/$1/stat" || true; } 2>/dev/null
    [ -n "${stat:-}" ] || return 1
    stat=${stat##*) } # the name before it may hold spaces
    # shellcheck disable=SC2086
    set -- $stat
    printf '%s' "${20}"
}

# A file records "PID TICKS". Prints the id if that very process is still there.
recorded_pid() { # recorded_pid FILE
    local pid ticks
    [ -r "$1" ] && read -r pid ticks <"$1" || return 1
    [ -n "$pid" ] && [ "$(started_at "$pid")" = "$ticks" ] || return 1
    printf '%s' "$pid"
}

record_pid() { # record_pid FILE PID
    local ticks
    ticks=$(started_at "$2") || return 1
    printf '%s %s\n' "$2" "$ticks" >"$1.new" && mv "$1.new" "$1"
}

wait_gone() { # wait_gone PID SECONDS : until that process has ended
    local deadline=$((SECONDS + $2)) ticks
    ticks=$(started_at "$1") || return 0
    while [ "$(started_at "$1")" = "$ticks" ]; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}
