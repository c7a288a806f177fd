vim9script
# Find programs, and the options to start them with.
#
# The current folder may be an untrusted repository, so no program is found there (Windows searches it first,
# as does a PATH with '.'), and no Python module is imported from it.

const WINDOWS = has('win32')

# Options that start a program in this plugin's own folder, from which Python imports nothing.
export const OPTIONS = {cwd: expand('<sfile>:p:h'), env: {PYTHONSAFEPATH: '1'}}

# The command that installs the server, for messages: from this plugin's repository if it is in one.
const CHECKOUT = fnamemodify(expand('<sfile>:p:h'), ':h:h:h:h')
export const INSTALL = filereadable(CHECKOUT .. '/pyproject.toml')
  ? 'pip install ' .. shellescape(CHECKOUT)
  : 'run `pip install .` in a checkout of its repository'

def IsAbsolute(path: string): bool
  return path =~ (WINDOWS ? '^\(\a:[\\/]\|[\\/]\{2}\)' : '^/')
enddef

# Return the absolute path of a program; '' if no absolute folder of the PATH contains it. Relative paths are
# never found.
export def Find(name: string): string
  if IsAbsolute(name)
    return executable(name) ? name : ''
  endif
  if name == '' || name =~ (WINDOWS ? '[\\/:]' : '/')
    return ''
  endif
  for folder in split($PATH, WINDOWS ? ';' : ':')
    const file = substitute(folder, '[\\/]*$', '/', '') .. name
    if IsAbsolute(folder) && executable(file)
      return exepath(file)
    endif
  endfor
  return ''
enddef
