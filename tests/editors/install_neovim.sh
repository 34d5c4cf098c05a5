#!/usr/bin/env bash
# Neovim 0.12 or later for the tests, into build/neovim (64 MB): Debian testing's packages, unpacked beside the system with their own C
# library. Nothing is installed. (0.11 comes as a wheel with the other test requirements.) Run it again, and it does nothing.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$root/build/neovim
[ ! -x "$folder/bin/nvim" ] || exit 0
rm -rf "$folder"
mkdir -p "$folder"/apt/{lists,cache/archives}/partial "$folder"/{debs,root,bin}
cd "$folder"

# An apt of its own: the system's mirror, another suite, and no package installed, so that the whole closure is resolved.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 '/debian/$')
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror testing main" >apt/sources.list
: >apt/status
cat >apt/apt.conf <<CONF
Dir::Etc::sourcelist "$folder/apt/sources.list"; Dir::Etc::sourceparts "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
Dir::State::Lists "$folder/apt/lists"; Dir::State::status "$folder/apt/status"; Dir::Cache "$folder/apt/cache";
Acquire::Languages "none"; APT::Sandbox::User "root";
CONF
export APT_CONFIG=$folder/apt/apt.conf
apt-get -qq update
packages=$(apt-get -s -qq --no-install-recommends install neovim | awk '/^Inst/ {print $2}')
(cd debs && apt-get -qq download $packages)
for package in debs/*.deb; do dpkg -x "$package" root; done

libraries=$folder/root/usr/lib/$(uname -m)-linux-gnu
cat >bin/nvim.new <<RUN
#!/bin/sh
export VIMRUNTIME="$folder/root/usr/share/nvim/runtime"
exec "$(echo "$libraries"/ld-linux-*.so.2)" --library-path "$libraries" "$folder/root/usr/bin/nvim" "\$@"
RUN
chmod +x bin/nvim.new
bin/nvim.new --version | head -1
mv bin/nvim.new bin/nvim
rm -rf apt debs
