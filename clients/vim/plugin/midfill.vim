vim9script noclear
# midfill: code completion on your own machine, as ghost text. See :help midfill.

if exists('g:loaded_midfill')
  finish
endif
g:loaded_midfill = true

if !has('patch-9.0.1378') || !has('job') || !has('channel') || !has('textprop') || !has('timers')
  echomsg 'midfill: Vim 9.0.1378 or newer with +job, +channel, +textprop and +timers is needed.'
  finish
endif

import autoload '../autoload/midfill.vim'

command -nargs=1 -complete=customlist,midfill.Names Midfill midfill.Run(<q-args>)

# Map the keys after all other mappings, so that their earlier meanings can be kept.
if v:vim_did_enter
  midfill.Start()
else
  augroup midfill_start
    autocmd!
    autocmd VimEnter * ++once midfill.Start()
  augroup END
endif
