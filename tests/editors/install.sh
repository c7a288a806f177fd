#!/usr/bin/env bash
# Installs the editors that tests/editors drives, where they are not here yet. Debian; root for its packages.
#
#   tests/editors/install.sh            all of them
#   tests/editors/install.sh emacs      one of them: emacs, tmux, vim, vscode
#
# Neovim and the driver of the browser come with `pip install '.[editors]'`. What is not a Debian package goes to
# ~/.cache/midfill-tests; MIDFILL_TEST_EDITORS names another folder. `pytest` starts this script where CI is set.
set -euo pipefail

CODE_SERVER=4.100.3 # VS Code 1.100.3; the last that runs on node 20

folder=${MIDFILL_TEST_EDITORS:-$HOME/.cache/midfill-tests}
mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9

# debian PACKAGE...: install those that are missing.
debian() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "install.sh: root is needed for: apt-get install ${missing[*]}" >&2
        return 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; }
}

install_tmux() { debian tmux; }

# Debian 12 has Emacs 28.2, eglot 1.9, lsp-mode 8.0, package-lint 0.16 and evil 1.14.
install_emacs() { debian tmux emacs-nox elpa-eglot elpa-evil elpa-lsp-mode elpa-package-lint; }

# Debian 12 has Vim 9.0.1378.
install_vim() { debian tmux vim-nox; }

# VS Code as the npm package code-server brings it, and a browser to show it. npm's scripts stay off: those of
# code-server download what is not needed here. It appears under its name only when it is whole.
install_vscode() {
    debian chromium fonts-dejavu-core
    local final=$folder/code-server-$CODE_SERVER
    [ ! -d "$final" ] || return 0
    local partial=$final.partial
    rm -rf "$partial" && mkdir "$partial"
    echo '{"private": true}' >"$partial/package.json"
    (
        cd "$partial"
        npm install --ignore-scripts --omit=dev --no-audit --no-fund --silent "code-server@$CODE_SERVER"
        cd node_modules/code-server/lib/vscode
        npm install --ignore-scripts --omit=dev --no-audit --no-fund --silent
    )
    mv "$partial" "$final"
}

editors=("$@")
[ $# -gt 0 ] || editors=(emacs tmux vim vscode)
for editor in "${editors[@]}"; do
    if ! declare -F "install_$editor" >/dev/null; then
        echo "install.sh: unknown editor \"$editor\"; known are: emacs, tmux, vim, vscode" >&2
        exit 2
    fi
    "install_$editor"
done
