-- Gives up what the token ARGV[1] has of the lock KEYS[1]: the lock itself, or a place in its queue,
-- KEYS[2]. A lock goes to the first in the queue.
-- Answers 0 if the lock was not the token's, 1 if it was. If the token ARGV[2] wants the lock again,
-- for ARGV[3] milliseconds and with ARGV[4] fencing tokens, and somebody else has it now, that token
-- stands at the end of the queue, which is kept for ARGV[5] milliseconds; then the answer is
-- {milliseconds that the new holder has, the server's time}. KEYS[3] is the fencing counter.
local ours = redis.call('GET', KEYS[1]) == ARGV[1]
if redis.call('EXISTS', KEYS[2]) == 0 then
  if ours then return redis.call('DEL', KEYS[1]) end
  return 0
end
