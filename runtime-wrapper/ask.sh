# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh
#
# How a launcher of sh asks a process of ours that has loaded everything already: text into a FIFO `ask`, and out of
# another, `answer`, an exit status and lines for stderr. Read by the wrapper and by the hook; nothing here starts a program.

# talk DIR TEXT: the status that was answered. 2 and nothing said: nobody is there, or the answer did not come.
talk() {
    # A longer text than a pipe takes would wait for a reader who may be gone.
    [ ${#2} -lt 60000 ] && [ -p "$1/ask" ] && [ -p "$1/answer" ] || return 2
    # 4 ends when the other process does. It is opened beside 5, or it would wait for a writer who may be gone.
    exchange "$2" 3<>"$1/ask" 5<>"$1/answer" 4<"$1/answer"
}

exchange() {
    exec 5<&-
    printf '%s' "$1" >&3
    IFS= read -r nv_status <&4
    case $nv_status in [01]) ;; *) return 2 ;; esac
    while IFS= read -r nv_line <&4 || [ "$nv_line" ]; do
        [ -z "$nv_line" ] || printf '%s\n' "$nv_line" >&2
    done
    return "$nv_status"
}

# ask_reserve DIR WORD ...: the status that the reserve (nvruntime/reserve.py) answers, which has DIR; 2 as above.
# Each line of what it is asked is a word.
ask_reserve() {
    nv_reserve=$1
    shift
    nv_text="$#
"
    for nv_word; do
        case $nv_word in
        *'
'*) return 2 ;;
        esac
        nv_text="$nv_text$nv_word
"
    done
    nv_pid=
    [ -O "$nv_reserve" ] && { read -r nv_pid <"$nv_reserve/pid"; } 2>/dev/null && is_our_like || return 2
    set -C # a slot is whose file `taken` it is
    nv_slot=0
    while [ "$nv_slot" -lt 16 ]; do
        if printf '' 2>/dev/null >"$nv_reserve/$nv_slot/taken"; then
            set +C
            talk "$nv_reserve/$nv_slot" "$nv_text"
            return
        fi
        nv_slot=$((nv_slot + 1))
    done
    set +C
    return 2
}

# Whether the process $nv_pid lives as this one does: what it does for us is then what we would have done. Neither another
# mount namespace nor a frozen control group nor a process that is stopped is ours.
is_our_like() {
    [ "/proc/$nv_pid/root" -ef / ] || return
    for nv_name in mnt pid user; do
        [ "/proc/$nv_pid/ns/$nv_name" -ef "/proc/self/ns/$nv_name" ] || return
    done
    read -r nv_line <"/proc/$nv_pid/stat" || return
    case ${nv_line##*) } in [TtZX]*) return 1 ;; esac
    nv_line=
    nv_other=
    { IFS= read -r nv_line; } 2>/dev/null </proc/self/attr/current # the label of SELinux or AppArmor
    { IFS= read -r nv_other; } 2>/dev/null <"/proc/$nv_pid/attr/current"
    [ "$nv_line" = "$nv_other" ] || return
    while IFS= read -r nv_line; do
        IFS= read -r nv_other <&3 && [ "$nv_line" = "$nv_other" ] || return
    done </proc/self/cgroup 3<"/proc/$nv_pid/cgroup"
}
