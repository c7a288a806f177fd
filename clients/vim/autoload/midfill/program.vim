vim9script
# Programs: where they are, and how they are started.
#
# The current folder may be a stranger's repository, so nothing in it is found by chance: not a program
# (Windows looks there first, and so does whoever has '.' on the PATH), and not a module of Python.

const WINDOWS = has('win32')

# How a program is started: in this plugin's own folder, and Python imports nothing from there either.
export const OPTIONS = {cwd: expand('<sfile>:p:h'), env: {PYTHONSAFEPATH: '1'}}

# The way to get the server, for messages: what is beside this plugin can be installed.
const CHECKOUT = fnamemodify(expand('<sfile>:p:h'), ':h:h:h:h')
export const INSTALL = filereadable(CHECKOUT .. '/pyproject.toml')
  ? 'pip install ' .. shellescape(CHECKOUT)
  : 'pip install . in a checkout of its repository'

def IsAbsolute(path: string): bool
  return path =~ (WINDOWS ? '^\(\a:[\\/]\|[\\/]\{2}\)' : '^/')
enddef

# The absolute path of a program; '' if there is none in an absolute folder of PATH. A path with a relative
# folder in it is never found.
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
