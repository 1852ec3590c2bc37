#!/usr/bin/env bash
# Starts three nodes on loopback under supervisors, loads this machine's /etc into them, shows that it works, and
# leaves them running. Behind `make cluster`; stopped by `make cluster-down`.
#
# CLUSTER_CLIENT_PORTS and CLUSTER_PEER_PORTS ("2379 22379 32379") choose other ports, CLUSTER_DATA another
# directory for the data, CLUSTER_TREE another tree to load than /etc.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
cd "$repo_dir"

mainstay=${MAINSTAY:-${CARGO_TARGET_DIR:-$HOME/.cache/mainstay-target}/release/mainstay}
# Variables of the same prefix are settings of the nodes; only what the files and flags say counts here.
unset MAINSTAY
[ -x "$mainstay" ] || fail "$mainstay does not exist; run \`make cluster\`, which builds it"
tree=${CLUSTER_TREE:-/etc}
ready_seconds=30

default_client_ports="2379 22379 32379"
default_peer_ports="2380 22380 32380"
read -r -a client_ports <<<"${CLUSTER_CLIENT_PORTS:-$default_client_ports}"
read -r -a peer_ports <<<"${CLUSTER_PEER_PORTS:-$default_peer_ports}"
[ ${#client_ports[@]} -eq 3 ] && [ ${#peer_ports[@]} -eq 3 ] ||
    fail "CLUSTER_CLIENT_PORTS and CLUSTER_PEER_PORTS must name three ports each"
for port in "${client_ports[@]}" "${peer_ports[@]}"; do
    [[ $port =~ ^[0-9]+$ ]] && [ "$port" -ge 1 ] && [ "$port" -le 65535 ] || fail "$port is no port"
done

for name in "${nodes[@]}"; do
    if recorded_pid "$run_dir/$name.supervisor.pid" >/dev/null || recorded_pid "$run_dir/$name.pid" >/dev/null; then
        fail "the cluster is running already; stop it with \`make cluster-down\`"
    fi
done
for port in "${client_ports[@]}" "${peer_ports[@]}"; do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        fail "port $port is in use (etcd's own service uses 2379 and 2380). Choose others, for example:
    CLUSTER_CLIENT_PORTS='12379 12479 12579' CLUSTER_PEER_PORTS='12380 12480 12580' make cluster"
    fi
done

mkdir -p "$run_dir"
# Peer addresses are part of the members' records: a directory that was founded with others cannot be used.
ports_line="${client_ports[*]} / ${peer_ports[*]}"
if [ -f "$data_dir/ports" ] && [ "$(cat "$data_dir/ports")" != "$ports_line" ]; then
    fail "$data_dir holds a cluster on the ports $(cat "$data_dir/ports"); use those, or delete the directory"
fi
printf '%s\n' "$ports_line" >"$data_dir/ports"

initial=
endpoints=
for i in 0 1 2; do
    initial+="${initial:+,}${nodes[$i]}=http://127.0.0.1:${peer_ports[$i]}"
    endpoints+="${endpoints:+,}http://127.0.0.1:${client_ports[$i]}"
done
custom_ports=
[ "$ports_line" = "$default_client_ports / $default_peer_ports" ] || custom_ports=1

started=
give_up() {
    local code=$?
    if [ -n "$started" ] && [ "$code" -ne 0 ]; then
        say "the cluster did not come up; the end of each log:"
        for name in "${nodes[@]}"; do
            say "--- $data_dir/$name.log"
            tail -n 15 "$data_dir/$name.log" >&2 || true
        done
        "$cluster_dir/down.sh" || true
    fi
    exit "$code"
}
trap give_up EXIT

for i in 0 1 2; do
    name=${nodes[$i]}
    arguments=(serve --config-file "$cluster_dir/$name.toml" --data-dir "$data_dir/$name")
    if [ -n "$custom_ports" ]; then
        arguments+=(--listen-client-urls "http://127.0.0.1:${client_ports[$i]}"
            --listen-peer-urls "http://127.0.0.1:${peer_ports[$i]}" --initial-cluster "$initial")
    fi
    # A session of its own, so that closing the terminal or Ctrl-C does not reach it.
    setsid --fork "$cluster_dir/supervise.sh" "$name" "$mainstay" "${arguments[@]}" \
        </dev/null >>"$data_dir/$name.log" 2>&1
done
started=1
# The supervisors have forked away from us and record their own ids and their nodes'.
deadline=$((SECONDS + ready_seconds))
for name in "${nodes[@]}"; do
    until recorded_pid "$run_dir/$name.pid" >/dev/null; do
        [ "$SECONDS" -lt "$deadline" ] || fail "$name did not start"
        sleep 0.05
    done
done

say "waiting for a leader ..."
until "$mainstay" --endpoints "$endpoints" --command-timeout 2s endpoint health -o json >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$deadline" ] || fail "no leader after $ready_seconds s"
    sleep 0.1
done
"$mainstay" --endpoints "$endpoints" endpoint status >&2

first=http://127.0.0.1:${client_ports[0]}
second=http://127.0.0.1:${client_ports[1]}
third=http://127.0.0.1:${client_ports[2]}

say ""
say "loading $tree through the first node:"
"$mainstay" --endpoints "$first" import "$tree" --prefix etc/

say ""
say "reading it back through the second node:"
count=$("$mainstay" --endpoints "$second" get --prefix etc/ --count-only -o simple)
say "  keys under etc/: $count"
sample=
for name in hostname debian_version os-release hosts passwd; do
    if [ -f "$tree/$name" ] && [ ! -L "$tree/$name" ]; then
        sample=$name
        break
    fi
done
if [ -z "$sample" ]; then
    sample=$("$mainstay" --endpoints "$second" get --prefix etc/ --keys-only --limit 1 -o simple | sed 's|^etc/||')
fi
"$mainstay" --endpoints "$second" get "etc/$sample" --print-value-only --raw -o simple | cmp - "$tree/$sample" ||
    fail "etc/$sample is not what $tree/$sample holds"
say "  etc/$sample is byte for byte what $tree/$sample holds"

say ""
say "watching through the third node while the first one writes:"
watch_log=$(mktemp)
watch_ready=$(mktemp -u)
"$mainstay" --endpoints "$third" watch demo/greeting --max-events 1 --ready-file "$watch_ready" -o simple \
    >"$watch_log" &
watcher=$!
until [ -e "$watch_ready" ]; do
    kill -0 "$watcher" 2>/dev/null || fail "the watch ended early"
    [ "$SECONDS" -lt "$deadline" ] || fail "the watch did not start"
    sleep 0.05
done
"$mainstay" --endpoints "$first" put demo/greeting "hello from node1" >/dev/null
wait "$watcher" || fail "the watch failed"
sed 's/^/  /' "$watch_log" >&2
rm -f "$watch_log" "$watch_ready"

trap - EXIT
say ""
say "three nodes are running, and will be started again if they die; their logs and data are in $data_dir"
printf 'export MAINSTAY_ENDPOINTS=%s\n' "$endpoints"
say ""
say "try next (with the line above):"
say "  $mainstay get --prefix etc/ --keys-only --limit 10"
say "  $mainstay watch --prefix etc/ &  $mainstay put etc/motd 'hello'"
say "  $mainstay doctor"
say "stop it with: make cluster-down"
