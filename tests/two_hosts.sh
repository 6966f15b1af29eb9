#!/usr/bin/env bash
# Two hosts on one: two network namespaces joined by a veth pair, a torchrun in each. Needs root; not run by pytest.
#
#   tests/two_hosts.sh [kill|link|blink] [python]       # two or three minutes
#
# kill: the second host's torchrun and its ranks are killed, and started again 20 seconds later.
# link: the cable between them is cut, the second host is restarted, then the cable is mended.
# blink: the cable is cut for 10 seconds; nobody does anything.
# The run must end with the weights of a run on one host that nothing touched.
set -eu
cd "$(dirname "$0")/.."
fault=${1:-kill} python=${2:-python3} folder=$(mktemp -d)
# Without this, torchrun 2.13 lets no host join again: it waits a minute for an address that the others have kept from
# the first round and do not publish for the second ("wait timeout ... MASTER_ADDR"), and all end with exit code 1.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE-1}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
run="train_tokenizer.py --data glyphs:60:AB --size 24 --channels 32 --multipliers 1 1 --blocks 1 --workers 0"
run="$run --gan-weight 0.1 --lecam-weight 0.05 --global-batch 8 --micro-batch 4 --lr 1e-3 --eval-every 1000"
run="$run --steps ${STEPS:-400} --save-every 10 --log-every 10"

tidy() {
    for host in 1 2; do
        ip netns pids nanohost$host 2>/dev/null | xargs -r kill -9 || true
        ip netns delete nanohost$host 2>/dev/null || true
    done
}
trap tidy EXIT
tidy
ip netns add nanohost1
ip netns add nanohost2
ip link add nanoveth1 netns nanohost1 type veth peer name nanoveth2 netns nanohost2
for host in 1 2; do
    ip -n nanohost$host address add 10.77.0.$host/24 dev nanoveth$host
    ip -n nanohost$host link set nanoveth$host up
    ip -n nanohost$host link set lo up
done

host() { # start host $1's torchrun in the background
    # Both namespaces have one host name, which means nothing on the cable: torchrun must be told who it is.
    local is_host=$((2 - $1))
    GLOO_SOCKET_IFNAME=nanoveth$1 ip netns exec nanohost"$1" "$python" -m torch.distributed.run --nnodes 2 \
        --nproc_per_node 1 --rdzv_id run --rdzv_backend c10d --rdzv_endpoint 10.77.0.1:29500 \
        --rdzv_conf is_host=$is_host --local_addr 10.77.0."$1" --max-restarts 3 $run --out "$folder/two" >>"$folder/host$1.txt" 2>&1 &
}
now() { date +%s; }
wait_for_step() {
    until grep -q "^step $1/" "$folder"/host?.txt; do
        kill -0 $first || exit 1
        sleep 0.2
    done
}

host 1
first=$!
sleep 1
host 2
wait_for_step 50
echo "both hosts at work; fault: $fault"
began=$(now)
[ "$fault" = kill ] || ip -n nanohost1 link set nanoveth1 down
[ "$fault" = kill ] || sleep 10
[ "$fault" = blink ] || ip netns pids nanohost2 | xargs -r kill -9
[ "$fault" = blink ] || sleep 20
steps() { cat "$folder"/host?.txt | grep -c "^step" || true; }
before=$(steps)
[ "$fault" = kill ] || ip -n nanohost1 link set nanoveth1 up
[ "$fault" = blink ] || host 2
until [ "$(steps)" -gt "$before" ]; do
    kill -0 $first 2>/dev/null || break
    sleep 1
done
echo "training again $(($(now) - began)) s after the fault"
code=0
wait $first || code=$?
echo "first host: exit code $code"
wait || true
grep -h "resumed" "$folder"/host?.txt || true

"$python" $run --out "$folder/one" >"$folder/one.txt"
FOLDER=$folder PYTHONPATH=tests:. "$python" -c '
import os
from pathlib import Path
from stress import compare
equal = compare(Path(os.environ["FOLDER"], "one"), Path(os.environ["FOLDER"], "two"))
print("weights, optimizers, log as of a run on one host that nothing touched:", equal)
raise SystemExit(equal is not True)
'
rm -r "$folder"
