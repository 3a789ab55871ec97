# A guest of a few hundred bytes: counts, in a register and in RAM alike, and prints the count (in
# units of 2^20) on the serial port. If register and RAM ever differ, device state and memory are
# not of the same instant, and it prints BAD.
# Typed on the console: `r` resets the machine, `p` panics first as Linux does, `f` prints without
# end.
# Booted through the PVH entry: 32-bit protected mode, flat segments, no paging, no interrupts.
	.section .note.pvh, "a", @note
	.long	4, 4, 18		# sizes of name and value; XEN_ELFNOTE_PHYS32_ENTRY
	.asciz	"Xen"
	.long	start

	.text
	.globl	start
start:
	movl	$stack_top, %esp
	movl	$hello, %esi
	call	puts
	xorl	%ebx, %ebx
again:
	incl	%ebx
	incl	count
	cmpl	%ebx, count
	jne	bad
	testl	$0xfffff, %ebx
	jnz	again
	movl	$prefix, %esi
	call	puts
	movl	%ebx, %edx		# its top 12 bits are the count in units of 2^20
	movl	$3, %ecx
digit:
	roll	$4, %edx
	movl	%edx, %eax
	andl	$15, %eax
	movb	digits(%eax), %al
	call	putc
	loop	digit
	movb	$'\n', %al
	call	putc
	movw	$0x3fd, %dx		# line status: has something been typed?
	inb	%dx, %al
	testb	$1, %al
	jz	again
	movw	$0x3f8, %dx
	inb	%dx, %al
	cmpb	$'r', %al
	je	reset
	cmpb	$'p', %al
	je	panic
	cmpb	$'f', %al
	je	flood
	jmp	again

bad:
	movl	$bad_text, %esi
	call	puts
stop:
	hlt
	jmp	stop
panic:
	movl	$panic_text, %esi
	call	puts
reset:
	lidt	no_idt			# a fault with no handlers: triple fault
	int3
flood:
	movl	$flood_text, %esi
	call	puts
	jmp	flood

puts:					# esi: text
	lodsb
	testb	%al, %al
	jz	done
	call	putc
	jmp	puts
putc:					# al: character
	pushl	%edx
	pushl	%eax
wait:
	movw	$0x3fd, %dx
	inb	%dx, %al
	testb	$0x20, %al		# transmitter empty
	jz	wait
	popl	%eax
	movw	$0x3f8, %dx
	outb	%al, %dx
	popl	%edx
done:
	ret

	.data
hello:	.asciz	"guest up\n"
prefix:	.asciz	"n "
digits:	.ascii	"0123456789abcdef"
bad_text: .asciz "BAD\n"
panic_text: .asciz "Kernel panic - not syncing: as asked\n"
flood_text: .asciz "flooding the console with line after line of the very same text\n"
no_idt:	.word	0
	.long	0
	.balign	4096
count:	.long	0
	.balign	4096
	.skip	4096
stack_top:
